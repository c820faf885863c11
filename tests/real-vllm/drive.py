"""Drives conversations through Envoy, epp and kv-indexer to two real vLLM servers, and compares what was predicted with
what the servers report. Called by `run`."""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

BLOCK = 32
MODEL = "tiny"
ADAPTERS = ["sql", "poems"]
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def http(url, body=None, timeout=120):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def wait(what, seconds, check):
    end = time.monotonic() + seconds
    last = None
    while time.monotonic() < end:
        try:
            if (found := check()) is not None:
                return found
        except (OSError, ValueError, KeyError, AssertionError) as error:
            last = error
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {seconds} s; {last}")


class Program:
    """A child with a log; ended by its number, whatever becomes of us."""

    running = []

    def __init__(self, name, command, folder, env=None):
        self.name, self.log = name, os.path.join(folder, name + ".log")
        self.file = open(self.log, "ab")
        self.child = subprocess.Popen(
            command, stdout=self.file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})},
            cwd=ROOT, start_new_session=True,
        )
        Program.running.append(self)

    def said(self, begin, seconds=30):
        def look():
            assert self.child.poll() is None, f"{self.name} ended: see {self.log}"
            for line in open(self.log, errors="replace"):
                if line.startswith(begin):
                    return line[len(begin):].strip()
            return None
        return wait(f"{self.name} says {begin!r}", seconds, look)

    def end(self, how=signal.SIGTERM):
        if self.child.poll() is None:
            # Its own group: vLLM has processes below it.
            os.killpg(self.child.pid, how)
        self.child.wait(60)
        Program.running.remove(self)


class Vllm:
    def __init__(self, number, options):
        self.options, self.name = options, f"pod-{number}"
        self.port, self.events, self.replay = free_port(), free_port(), free_port()
        self.start()

    def start(self):
        o = self.options
        self.program = Program(self.name, [
            o.vllm, "serve", o.model_dir, "--served-model-name", MODEL, "--load-format", "dummy", "--enforce-eager",
            "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "8", "--block-size", str(BLOCK),
            "--num-gpu-blocks-override", str(o.blocks), "--enable-prefix-caching", "--enable-prompt-tokens-details",
            "--enable-scale-out", "--kv-events-config", json.dumps({
                "enable_kv_cache_events": True, "publisher": "zmq",
                # vLLM binds what has a star in it, and connects to anything else.
                "endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}", "topic": f"kv@{self.name}@{MODEL}",
                "buffer_steps": 10000,
            }), "--host", "127.0.0.1", "--port", str(self.port), "--seed", "0", "--enable-lora", "--max-lora-rank", "8",
            "--max-loras", "2", "--lora-modules", *[f"{name}={o.model_dir}/{name}" for name in ADAPTERS],
        ], o.folder, {
            "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo", "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
        })

    def wait(self):
        wait(f"{self.name} is healthy", 420, lambda: http(self.url("/health")) is not None or None)

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"


class Stack:
    """The servers, and everything in front of them."""

    def __init__(self, options):
        self.options = options
        self.pods = [Vllm(number, options) for number in (1, 2)]
        for pod in self.pods:
            pod.wait()
        arguments = [f"--pod={pod.name}=tcp://127.0.0.1:{pod.events},replay=tcp://127.0.0.1:{pod.replay}" for pod in self.pods]
        self.indexer = Program("kv-indexer", [
            os.path.join(options.binaries, "kv-indexer"), "--grpc-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
            "--block-size", str(BLOCK), *arguments,
        ], options.folder)
        self.indexer_grpc = self.indexer.said("grpc listening on ")
        self.indexer_admin = self.indexer.said("admin listening on ")
        wait("kv-indexer is ready", 30, lambda: http(f"http://{self.indexer_admin}/readyz"))
        config = os.path.join(options.folder, "epp.yaml")
        with open(config, "w") as file:
            file.write(self.configuration())
        self.epp = Program("epp", [
            os.path.join(options.binaries, "epp"), "--config-file", config, "--bind-address", "127.0.0.1", "--grpc-port", "0",
            "--grpc-health-port", "0", "--metrics-port", "0", "--secure-serving=false", "--health-checking",
        ], options.folder)
        self.epp_metrics = self.epp.said("metrics listening on ")
        self.envoy(self.epp.said("ext_proc listening on "))

    def configuration(self):
        """The shipped profile, with this indexer and this model's tokenizer."""
        endpoints = os.path.join(self.options.folder, "endpoints.yaml")
        with open(endpoints, "w") as file:
            file.write("endpoints:\n")
            for pod in self.pods:
                file.write(f"- {{name: {pod.name}, address: 127.0.0.1, port: '{pod.port}'}}\n")
        text = open(os.path.join(ROOT, "config", "epp-precise.yaml")).read()
        for old, new in [("127.0.0.1:50051", self.indexer_grpc), ("/mnt/models", self.options.models_dir), ("/etc/epp/endpoints.yaml", endpoints)]:
            assert old in text, f"{old} in config/epp-precise.yaml"
            text = text.replace(old, new)
        return text

    def envoy(self, epp):
        folder = self.options.folder
        text = open(os.path.join(ROOT, "deploy", "envoy", "recommended.yaml")).read()
        pods = os.path.join(folder, "pods.yaml")
        for old, new in [
            ("address: 0.0.0.0, port_value: 8081", "address: 127.0.0.1, port_value: 0"),
            ("port_value: 19000", "port_value: 0"),
            ("port_value: 9002", f"port_value: {epp.rsplit(':', 1)[1]}"),
            ("path: deploy/envoy/pods.yaml", f"path: {pods}"),
        ]:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        addresses = "".join(
            f"          - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {pod.port}}}}}}}\n"
            for pod in self.pods
        )
        with open(pods, "w") as file:
            file.write(
                'resources:\n  - "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n'
                f"    cluster_name: pods\n    endpoints:\n      - lb_endpoints:\n{addresses}"
            )
        config = os.path.join(folder, "envoy.yaml")
        with open(config, "w") as file:
            file.write(text)
        admin = os.path.join(folder, "admin")
        Program("envoy", [
            self.options.envoy, "-c", config, "--admin-address-path", admin, "--use-dynamic-base-id", "--concurrency", "1",
            "--log-level", "warn",
        ], folder)
        address = wait("envoy's admin", 30, lambda: open(admin).read().strip() or None)

        def listener():
            page = json.loads(http(f"http://{address}/listeners?format=json"))
            found = page["listener_statuses"][0]["local_address"]["socket_address"]
            return f"127.0.0.1:{found['port_value']}" if found["port_value"] else None

        self.clients = wait("envoy's listener", 30, listener)
        wait("envoy is live", 30, lambda: http(f"http://{address}/ready"))
        # The endpoint picker's health is looked at every two seconds.
        wait("the path works", 30, lambda: http(f"http://{self.clients}/v1/models"))

    def metrics(self):
        found = {}
        for line in http(f"http://{self.epp_metrics}/metrics").decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[name] = float(value)
        return found

    def chat(self, model, messages, **more):
        body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0.7, **more}
        answer = json.loads(http(f"http://{self.clients}/v1/chat/completions", body))
        text = answer["choices"][0]["message"]["content"] or " "
        return text, answer["usage"]


WORDS = "the cache of a pod holds blocks of prompts that engines compute once and serve again when a request begins alike".split()


def text(chance, words):
    return " ".join(chance.choice(WORDS) for _ in range(words))


def conversation(stack, number, turns, seen):
    """Several turns; every fourth conversation asks an adapter, every fifth has a salt."""
    chance = random.Random(number)
    model = ADAPTERS[number // 4 % 2] if number % 4 == 3 else MODEL
    more = {"cache_salt": f"tenant-{number}"} if number % 5 == 4 else {}
    shared = text(random.Random(number % 3), 150)
    messages = [{"role": "system", "content": shared}]
    for _ in range(turns):
        messages.append({"role": "user", "content": text(chance, chance.randint(20, 120))})
        said, usage = stack.chat(model, messages, **more)
        messages.append({"role": "assistant", "content": said})
        details = usage.get("prompt_tokens_details") or {}
        seen.append((usage["prompt_tokens"], details.get("cached_tokens")))


def total(metrics, name, label=""):
    return sum(value for series, value in metrics.items() if series.split("{")[0] == name and label in series)


def phase(stack, name, conversations, turns, streams):
    before, began, seen, failed = stack.metrics(), time.monotonic(), [], []

    def one(number):
        try:
            conversation(stack, number, turns, seen)
        except (OSError, KeyError, ValueError) as error:
            failed.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(one, conversations))
    # Responses are accounted for when their streams end, a moment after the client has them.
    time.sleep(0.5)
    after = stack.metrics()

    def grown(metric, label=""):
        return total(after, metric, label) - total(before, metric, label)

    prompt = sum(tokens for tokens, _ in seen)
    cached = sum(tokens or 0 for _, tokens in seen)
    compared, exact = grown("epp_prefix_predictions_total"), grown("epp_prefix_predictions_total", 'outcome="exact"')
    result = {
        "phase": name,
        "requests": len(seen),
        "failed": len(failed),
        "seconds": round(time.monotonic() - began, 1),
        "prompt tokens": prompt,
        "cached tokens": cached,
        "hit ratio": round(cached / max(prompt, 1), 3),
        "compared": int(compared),
        "exact": int(exact),
        "share": round(exact / max(compared, 1), 4),
        "over, tokens": int(grown("epp_prefix_overpredicted_tokens_total")),
        "under, tokens": int(grown("epp_prefix_underpredicted_tokens_total")),
        "not compared": int(grown("epp_prefix_unobserved_total")),
        "fallback": int(grown("epp_precise_fallback_total")),
    }
    print(json.dumps(result), flush=True)
    for fault in failed[:3]:
        print("  " + fault, flush=True)
    return result


def tokens_agree(stack):
    """Are the servers' token ids ours?"""
    chance = random.Random(7)
    chats = [
        {"model": MODEL, "messages": [
            {"role": "user", "content": text(chance, n) + " – naïve\n\n  x = 1; // done 日本語 🙂"},
            {"role": "assistant", "content": "ok"}, {"role": "user", "content": "a" * n},
        ]} for n in range(1, 40)
    ]
    theirs = [json.loads(http(stack.pods[0].url("/tokenize"), chat))["tokens"] for chat in chats]
    lines = "\n".join(json.dumps(chat) for chat in chats)
    ours = subprocess.run(
        [os.path.join(stack.options.binaries, "kv-indexer"), "tokenize", "--model-dir", stack.options.model_dir, "--chat", "-"],
        input=lines, capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.splitlines()
    same = sum(json.loads(a) == b for a, b in zip(ours, theirs, strict=True))
    print(json.dumps({"phase": "token ids", "chats": len(chats), "equal": same}), flush=True)
    assert same == len(chats), "token ids differ from the server's"


def main():
    parser = argparse.ArgumentParser()
    for name in ["binaries", "envoy", "vllm"]:
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--report", help="file for the results, a JSON object a line")
    options = parser.parse_args()
    options.binaries, options.envoy = os.path.abspath(options.binaries), os.path.abspath(options.envoy)
    with tempfile.TemporaryDirectory(prefix="real-vllm-") as folder:
        options.folder, options.models_dir = folder, os.path.join(folder, "models")
        options.model_dir = os.path.join(options.models_dir, MODEL)
        subprocess.run([sys.executable, os.path.join(HERE, "model.py"), options.model_dir], check=True)
        try:
            results = drive(options)
        except BaseException:
            for name in ["epp", "kv-indexer", "envoy", "pod-1", "pod-2"]:
                path = os.path.join(folder, name + ".log")
                if os.path.exists(path):
                    print(f"--- {name}", "".join(open(path, errors="replace").readlines()[-15:]), sep="\n", file=sys.stderr)
            raise
        finally:
            for program in list(Program.running):
                program.end(signal.SIGKILL)
    if options.report:
        with open(options.report, "w") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)


def drive(options):
    stack = Stack(options)
    tokens_agree(stack)
    n, turns, streams = options.conversations, options.turns, options.streams
    results = [phase(stack, "steady", range(n), turns, streams)]
    results.append(phase(stack, "more of them, evictions", range(n, 3 * n), turns, streams))

    # The caches are emptied; the events of it come with the next requests.
    for pod in stack.pods:
        http(pod.url("/reset_prefix_cache"), {})
    results.append(phase(stack, "after reset_prefix_cache", range(3 * n, 3 * n + n // 2), turns, streams))

    # One server dies without a word, and comes back empty, on the same ports.
    pod = stack.pods[0]
    pod.program.end(signal.SIGKILL)
    results.append(phase(stack, "one server is dead", range(4 * n, 4 * n + n // 4), turns, streams))
    pod.start()
    pod.wait()
    results.append(phase(stack, "it is back", range(5 * n, 6 * n), turns, streams))

    steady = results[0]
    assert steady["failed"] == 0 and steady["compared"] > 0.9 * steady["requests"], steady
    assert steady["share"] >= 0.995, f"predicted and actual agree for {steady['share']}"
    assert results[-1]["failed"] == 0 and results[-1]["share"] >= 0.99, results[-1]
    return results


if __name__ == "__main__":
    threading.excepthook = lambda args: None
    main()
