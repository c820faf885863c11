"""What benches/guidellm/run needs beside GuideLLM.

measure.py gateway FILE                        waits for Envoy and prints its URL; FILE has its admin address
measure.py sample FILE NAME=PID[+PID…] …       samples /proc until SIGTERM, then writes FILE
measure.py table FOLDER SCENARIO …             prints the table
"""

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def gateway(file):
    """Envoy's listener, once it answers."""
    deadline = time.monotonic() + 20
    while True:
        try:
            admin = Path(file).read_text().strip()
            with urllib.request.urlopen(f"http://{admin}/listeners?format=json") as page:
                address = json.load(page)["listener_statuses"][0]["local_address"]["socket_address"]
            url = f"http://{address['address']}:{address['port_value']}"
            urllib.request.urlopen(f"{url}/v1/models").read()
            return url
        except (OSError, LookupError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def usage(pids):
    """CPU seconds so far and resident bytes now."""
    ticks, pages = 0, 0
    for pid in pids:
        # The name may have spaces; what follows its parenthesis has not.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
        pages += int(fields[21])
    return ticks / TICK, pages * PAGE


def sample(file, components):
    """[time, {name: [cpu_s, rss]}] every quarter of a second; time as GuideLLM has it, seconds since 1970."""
    watched = {name: pids.split("+") for name, pids in (it.split("=") for it in components)}
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    samples = []
    while not ended:
        samples.append([time.time(), {name: usage(pids) for name, pids in watched.items()}])
        time.sleep(0.25)
    samples.append([time.time(), {name: usage(pids) for name, pids in watched.items()}])
    Path(file).write_text(json.dumps(samples))


def within(samples, name, start, end):
    """CPU seconds between two times, and the most memory."""
    inside = [values[name] for at, values in samples if start - 0.3 <= at <= end + 0.3]
    if len(inside) < 2:
        return None
    return inside[-1][0] - inside[0][0], max(rss for _, rss in inside)


def metric(benchmark, name, which):
    value = benchmark["metrics"][name]["successful"]
    return value["percentiles"][which] if which.startswith("p") else value[which]


def rows(folder, scenario):
    report = json.loads((folder / f"{scenario}.json").read_text())
    samples = json.loads((folder / f"{scenario}.samples.json").read_text())
    for benchmark in report["benchmarks"]:
        yield scenario, benchmark, samples


def table(folder, scenarios):
    folder = Path(folder)
    print(
        "| scenario | asked | requests | errors | req/s | in flight, mean | TTFT p50 / p95 ms | ITL mean ms "
        "| envoy CPU ms/req, MiB | epp CPU ms/req, MiB | engines CPU ms/req, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for scenario in scenarios:
        for name, benchmark, samples in rows(folder, scenario):
            strategy = benchmark["config"]["strategy"]
            asked = strategy.get("streams") or strategy.get("max_concurrency") or 1
            totals = benchmark["metrics"]["request_totals"]
            done, errors = totals["successful"], totals["errored"]
            costs = []
            for component in ("envoy", "epp", "engines"):
                cost = within(samples, component, benchmark["start_time"], benchmark["end_time"])
                if cost is None or not done:
                    costs.append("-")
                else:
                    costs.append(f"{cost[0] * 1e3 / done:.2f}, {cost[1] / 2**20:.0f}")
            cells = [
                name,
                asked,
                done,
                errors,
                f"{metric(benchmark, 'requests_per_second', 'mean'):.1f}",
                f"{metric(benchmark, 'request_concurrency', 'mean'):.1f}",
                f"{metric(benchmark, 'time_to_first_token_ms', 'p50'):.1f} / "
                f"{metric(benchmark, 'time_to_first_token_ms', 'p95'):.1f}",
                f"{metric(benchmark, 'inter_token_latency_ms', 'mean'):.2f}",
                *costs,
            ]
            print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main():
    verb, *rest = sys.argv[1:]
    if verb == "gateway":
        print(gateway(rest[0]))
    elif verb == "sample":
        sample(rest[0], rest[1:])
    elif verb == "table":
        table(rest[0], rest[1:])
    else:
        sys.exit(__doc__)


main()
