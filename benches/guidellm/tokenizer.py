"""Trains a small byte-level BPE tokenizer on words that it makes up, and saves it for transformers:
`tokenizer.py FOLDER`. Nothing is downloaded."""

import random
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYLLABLES = [a + b + c for a in "bdfghklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s", "l")]


def texts():
    chance = random.Random(1)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(6000)]
    for _ in range(2000):
        yield " ".join(chance.choices(words, k=60)).capitalize() + "."


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    saved.save_pretrained(sys.argv[1])


main()
