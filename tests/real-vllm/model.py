"""Makes a tiny random Llama with a real byte-level BPE, a chat template and two LoRA adapters.

    python model.py FOLDER

The weights are random: what the engine caches depends on tokens only. The vocabulary is trained on the texts of this
repository, so that prompts in English have as many tokens as usual.
"""

import glob
import json
import os
import sys

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, INTERMEDIATE, VOCABULARY = 64, 2, 2, 128, 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The split of Qwen's tokenizers.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def tokenizer(folder, texts):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train(texts, trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.save(os.path.join(folder, "tokenizer.json"))
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    })
    return made.token_to_id("<|im_end|>")


def write(folder, name, content):
    with open(os.path.join(folder, name), "w") as file:
        json.dump(content, file, indent=1)


def adapter(folder, seed):
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(seed)
    rank = 8
    tensors = {}
    for layer in range(LAYERS):
        for projection in ["q_proj", "v_proj"]:
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN)
            tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, rank)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"))
    write(folder, "adapter_config.json", {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    })


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    texts = sorted(glob.glob(os.path.join(root, "*.md")) + glob.glob(os.path.join(root, "docs", "*.md")))
    end = tokenizer(folder, texts)
    write(folder, "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": end,
        "pad_token_id": 0,
    })
    for seed, name in enumerate(["sql", "poems"]):
        adapter(os.path.join(folder, name), seed)


if __name__ == "__main__":
    main()
