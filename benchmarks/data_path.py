"""Reading training data, side by side: our task and stock fairseq's, on the same synthetic token files.

    python benchmarks/data_path.py [--tokens 50e6] [--documents 20000,400000] [--length 1024] [--batch 16] [--json
    OUT.json]

Each variant runs in a process of its own and does what fairseq-train does until the first batch of a run that goes on
at 10% and at 90% of an epoch; then it reads batches: in this process, with --workers to help (the files being in
memory), and from the disk, where the first start finds the files too. The ratios are between numbers of one run. Peak
memory is what the process holds in its first start beyond its imports and the mapped files. The status is 1 where
batches differ, or where ours come at less than 5 times --consumed tokens per second (default: 600,000, what a 125M
model would take on one H200 at half of its peak).
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time

TASKS = {"stock": "language_modeling", "ours": "momentum_language_modeling"}


def make(folder: str, documents: int, args: argparse.Namespace) -> None:
    """Token files of ``documents`` documents, whose lengths vary as those of texts do, and their dictionary."""
    import numpy as np

    from momentum_lm.text.indexed import IndexedDatasetWriter

    rng = np.random.default_rng(documents)
    sizes = rng.lognormal(sigma=1.0, size=documents)
    sizes = np.maximum(1, sizes * args.tokens / sizes.sum()).astype(np.int32)
    with open(f"{folder}/dict.txt", "w") as file:
        file.writelines(f"{i} 1\n" for i in range(args.vocab - 4))
    if args.sparse:
        from fairseq.data.indexed_dataset import MMapIndexedDataset

        with MMapIndexedDataset.Index.writer(f"{folder}/train.idx", np.uint16) as index:
            index.write(sizes.tolist())
        with open(f"{folder}/train.bin", "wb") as file:
            file.truncate(2 * int(sizes.sum(dtype=np.int64)))
        return
    with IndexedDatasetWriter(f"{folder}/train", args.vocab) as writer:
        for some in np.array_split(sizes, -(-documents // 10000)):
            ids = rng.integers(4, args.vocab, size=some.sum(), dtype=np.int32)
            ids[np.cumsum(some) - 1] = 2
            writer.add_many(ids, some)
    with open(f"{folder}/train.bin", "rb") as file:
        os.fsync(file.fileno())


def bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def measure(task_name: str, folder: str, args: argparse.Namespace) -> dict:
    """All numbers of one variant."""
    import torch
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import momentum_lm

    logging.disable(logging.INFO)
    momentum_lm.register()
    torch.set_num_threads(1)
    words = [folder, "--task", task_name, "--arch", "gpt_lm_tiny", "--cpu", "--tokens-per-sample", args.length]
    words += ["--sample-break-mode", args.break_mode, "--batch-size", args.batch]
    parsed = options.parse_args_and_arch(options.get_training_parser(), [str(w) for w in words])
    cfg = convert_namespace_to_omegaconf(parsed)

    def start(at: float, workers: int = 0):
        """As fairseq's trainer does it. -> (seconds by stage, iterator, first batch)"""
        task = tasks.setup_task(cfg.task)
        times = [time.perf_counter()]
        task.load_dataset("train", epoch=1, combine=True, data_selector=None, tpu=False)
        times.append(time.perf_counter())
        epoch = task.get_batch_iterator(
            task.dataset("train"),
            max_tokens=None,
            max_sentences=args.batch,
            max_positions=args.length,
            ignore_invalid_inputs=True,
            required_batch_size_multiple=8,
            num_workers=workers,
            data_buffer_size=10,
        )
        times.append(time.perf_counter())
        if at:
            epoch.load_state_dict(
                {"epoch": 1, "iterations_in_epoch": int(at * len(epoch)), "version": 2, "shuffle": True}
            )
        iterator = epoch.next_epoch_itr()
        first = next(iterator)
        times.append(time.perf_counter())
        stages = dict(zip(("load", "batches", "first"), (b - a for a, b in itertools.pairwise(times)), strict=True))
        return stages | {"whole": times[-1] - times[0]}, iterator, first

    def speed(iterator) -> float:
        tokens, began = 0, time.perf_counter()
        for batch in iterator:
            tokens += batch["ntokens"]
            if time.perf_counter() - began > args.seconds:
                break
        return tokens / (time.perf_counter() - began)

    print("ready", flush=True)  # imports are done
    sys.stdin.readline()  # and their memory is known
    before, result, digest = bytes_read(), {}, hashlib.sha256()
    forget(f"{folder}/train.bin")
    for at in (0, 0.1, 0.9):
        result[f"start at {at:.0%}"], iterator, first = start(at)
        if not at:
            result["read"] = bytes_read() - before
            print("started", flush=True)
        for batch in [first, *itertools.islice(iterator, 20)]:
            digest.update(batch["id"].numpy().tobytes() + batch["net_input"]["src_tokens"].numpy().tobytes())
            digest.update(batch["target"].numpy().tobytes())
        if not at:
            forget(f"{folder}/train.bin")
            result["tokens/s from the disk"] = speed(iterator)
    result["batches"] = digest.hexdigest()
    for workers in args.workers:
        result[f"tokens/s, {workers} workers"] = speed(start(0.5, workers)[1])
    return result


def forget(path: str) -> None:
    """Takes a file out of the page cache, but for what a process has mapped and used."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(task_name: str, folder: str, args: argparse.Namespace) -> dict:
    """``measure`` in a process of its own, and the peak of that process's memory in its first start, MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", task_name, "--folder", folder]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdin and process.stdout
        process.stdout.readline()
        base, samples, started = anonymous(process.pid), [], threading.Event()

        def watch() -> None:
            while not started.wait(0.002):
                samples.append(anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.stdin.write("go\n")
        process.stdin.flush()
        process.stdout.readline()
        started.set()
        watcher.join()
        output = process.stdout.read()
        if process.wait():
            log.seek(0)
            raise SystemExit(f"{task_name} failed\n{log.read()}")
        return json.loads(output.splitlines()[-1]) | {"peak": max(samples, default=base) - base}


def anonymous(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/status") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
    except FileNotFoundError:
        return 0.0


def compare(stock: dict, ours: dict, args: argparse.Namespace) -> tuple[str, list[str]]:
    """A table, and what is not as it should be."""
    rows = [
        (f"{key}, ms", *(1000 * r[key]["whole"] for r in (stock, ours))) for key in stock if key.startswith("start")
    ]
    rows += [
        (f"  {stage}, ms", *(1000 * r["start at 90%"][stage] for r in (stock, ours)))
        for stage in ("load", "batches", "first")
    ]
    rows += [
        ("read by the first start, MB", *(r["read"] / 1e6 for r in (stock, ours))),
        ("peak memory, MiB", stock["peak"], ours["peak"]),
    ]
    speeds = [key for key in stock if key.startswith("tokens/s")]
    rows += [(f"million {key}", *(r[key] / 1e6 for r in (stock, ours))) for key in speeds]
    lines = [f"{'':36}{'stock':>12}{'ours':>12}{'ours/stock':>12}"]
    lines += [f"{name:36}{a:12.2f}{b:12.2f}{b / a if a else float('nan'):12.3f}" for name, a, b in rows]
    least = min(ours[key] for key in speeds)
    lines.append(f"the least of ours / {args.consumed:,.0f} tokens/s consumed: {least / args.consumed:.1f}")
    failures = [] if stock["batches"] == ours["batches"] else ["the batches differ"]
    if least < 5 * args.consumed:
        failures.append(f"{least:,.0f} tokens/s are less than 5 times what is consumed")
    return "\n".join(lines), failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=50e6)
    parser.add_argument(
        "--documents", default="20000,400000", help="a corpus of --tokens for each of these numbers of documents"
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="token files of zeros, which take no room on the disk: for billions of tokens",
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=51200)
    parser.add_argument("--break-mode", default="none", choices=["none", "eos", "complete"])
    parser.add_argument("--workers", default="0,1,2", help="numbers of processes that help")
    parser.add_argument("--seconds", type=float, default=1, help="of reading, for each of these numbers")
    parser.add_argument("--consumed", type=float, default=600e3, help="tokens/s that a model takes of one process")
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.workers = [int(number) for number in args.workers.split(",")]
    if args.variant:
        print(json.dumps(measure(args.variant, args.folder, args)), flush=True)
        os._exit(0)  # fairseq's threads still read

    results, failures = {}, []
    for documents in (int(number) for number in args.documents.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            make(folder, documents, args)
            found = results[documents] = {name: run(task, folder, args) for name, task in TASKS.items()}
        table, wrong = compare(found["stock"], found["ours"], args)
        print(
            f"{documents:,} documents, {args.tokens:,.0f} tokens, {args.batch} x {args.length}, --sample-break-mode "
            f"{args.break_mode}"
        )
        print(table, end="\n\n", flush=True)
        failures += wrong
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": results}, file, indent=1)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
