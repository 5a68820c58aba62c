"""Speed of preparation beside the usual pipeline, on the real text of ../shared/data, every contender in one run.

    python benchmarks/prepare_speed.py [--repeats 3] [--megabytes 25]

Contenders, each in a process of its own, timed inside it without imports, in turns:
- ours: scripts/prepare_data.py from JSON lines to sealed shards, one process, two threads
- datasets: load_dataset("json"), map(tokenize, batched) and map(group_texts, batched) with num_proc=2, the way of
  transformers' examples/pytorch/language-modeling/run_clm.py
- encode_batch: `tokenizers.Tokenizer.encode_batch` alone over texts in memory, on all cores

Prints medians, ratios, bytes on disk for each token, the share of splits and duplicates, and the store against flat
files. A 16k byte-level BPE is trained first. Needs two quiet cores.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
BLOCK_SIZE = 1024
sys.path.insert(0, str(ROOT))


def write_corpus(path: Path, num_bytes: int) -> None:
    """JSON lines of real text: documents, code, dialogue and twenty languages, over again until there is enough."""
    texts = [line["text"] for line in read_lines(SHARED / "text/python311_stdlib.jsonl")]
    for name in ("alice_pg11_utf8.txt", "botchan.txt", "tinyshakespeare.txt", "wikitext2_valid.txt"):
        texts += (SHARED / "text" / name).read_text(encoding="utf-8-sig").split("\n\n")
    texts += [line["text"] for line in read_lines(SHARED / "text/udhr_20lang.jsonl")]
    texts += [f"{line['question']}\n{line['answer']}" for line in read_lines(SHARED / "instruct/gsm8k_train.jsonl")]
    texts += [
        f"{line['instruction']}\n{line['response']}" for line in read_lines(SHARED / "instruct/dolly15k_part0.jsonl")
    ]
    texts = [text for text in texts if text.strip()]
    written, copy = 0, 0
    with open(path, "w", encoding="utf-8") as stream:
        while written < num_bytes:
            for text in texts:
                text = f"{text}\n{copy}" if copy else text  # no copy is a duplicate
                written += len(text.encode())
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            copy += 1


def read_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- contenders: each returns seconds, tokens, bytes on disk and a digest of all ids in order -----------------------


def ours(folder: Path) -> dict:
    """The whole stage: read, check, split, tokenize, write, count, report, hash."""
    from codex_accel import dataset, duplicates, plan, shards, survey, tokenizer  # noqa: F401  not timed

    spent = time_of(duplicates, "count") | time_of(duplicates.RunWriter, "add", "close")
    assign_time = time_assign(survey)
    output = folder / "ours"
    shutil.rmtree(output, ignore_errors=True)
    main = load_script("prepare_data").main
    started, started_cpu = time.perf_counter(), time.process_time()
    main(
        [
            f"output_dir={output}",
            f"tokenizer={folder}/tokenizer",
            f"sources=[{{path: {folder}/corpus.jsonl}}]",
            "split={ratios: {train: 0.98, test: 0.02}}",
        ]
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    size = sum(path.stat().st_size for path in output.glob("*.arrow"))
    facts = json.loads((output / "manifest.json").read_bytes())["facts"]
    num_tokens = sum(split["num_tokens"] for split in facts["splits"].values())
    return {
        "seconds": seconds,
        "num_tokens": num_tokens,
        "num_bytes": size,
        "split_share": (sum(spent.values()) + sum(assign_time)) / cpu_seconds,
        "engine": facts["tokenized_by"],
    }


def time_of(module, *names: str) -> dict[str, float]:
    """CPU time spent in functions of a module from now on; wall time would count waiting for the interpreter too."""
    spent = dict.fromkeys(names, 0.0)

    def timed(name: str, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            started = time.thread_time()
            result = function(*args, **kwargs)
            spent[name] += time.thread_time() - started
            return result

        return call

    for name in names:
        setattr(module, name, timed(name, getattr(module, name)))
    return spent


def time_assign(survey) -> list[float]:
    """CPU time of every call of what `survey.assignment` returns."""
    times: list[float] = []
    assignment = survey.assignment

    def timed_assignment(plan):
        assign = assignment(plan)

        def call(*args):
            started = time.thread_time()
            result = assign(*args)
            times.append(time.thread_time() - started)
            return result

        return call

    survey.assignment = timed_assignment
    return times


def with_datasets(folder: Path) -> dict:
    """run_clm.py's pipeline."""
    import datasets
    import transformers

    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    datasets.disable_progress_bars()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"))

    def tokenize(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        joined = {key: [x for row in examples[key] for x in row] for key in examples}
        total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        result = {
            key: [values[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for key, values in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    started = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(cache))
    tokens = raw.map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    blocks = tokens.map(group_texts, batched=True, num_proc=2)
    seconds = time.perf_counter() - started
    written = {file["filename"] for made in (tokens, blocks) for file in made.cache_files}  # both stay on the disk
    num_bytes = sum(Path(name).stat().st_size for name in written)
    return {"seconds": seconds, "num_tokens": len(blocks) * BLOCK_SIZE, "num_bytes": num_bytes}


def encode_batch(folder: Path) -> dict:
    """The tokenizer alone."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = [line["text"] for line in read_lines(folder / "corpus.jsonl")]
    started = time.perf_counter()
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "num_tokens": sum(len(each.ids) for each in encoded), "num_bytes": 0}


def ids_digests(folder: Path) -> dict:
    """Not timed: digests of the sorted documents' ids, from our store and from `tokenizers`, which must agree."""
    import numpy as np
    import tokenizers

    from codex_accel.tokens import TokenStore

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = [line["text"] for line in read_lines(folder / "corpus.jsonl")]
    encoded = [
        np.array(each.ids, dtype=np.uint16) for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
    stored = [document.input_ids[1:-1] for name in ("train", "test") for document in TokenStore(folder / "ours", name)]

    def digest(arrays) -> str:
        return hashlib.sha256(
            b"".join(sorted(hashlib.sha256(array.tobytes()).digest() for array in arrays))
        ).hexdigest()

    return {"tokenizers": digest(encoded), "ours": digest(stored), "num_documents": len(stored)}


def store(folder: Path) -> dict:
    """The store against flat files: reading 1,024-token blocks at random as int64, and writing from arrays."""
    import numpy as np

    from codex_accel import tokens

    found = tokens.TokenStore(folder / "ours", "train")
    flat_path = folder / "flat.bin"
    everything = found.tokens(0, found.num_tokens).astype(np.uint16)
    everything.tofile(flat_path)
    flat = np.memmap(flat_path, dtype=np.uint16, mode="r")
    starts = np.random.default_rng(0).integers(0, found.num_tokens - BLOCK_SIZE, 20_000)
    times: dict[str, list[float]] = {name: [] for name in ("read", "read_flat", "write", "write_flat")}
    num_documents, length = 4000, 4096
    values = np.resize(everything, num_documents * length)
    columns = tokens.Documents(
        input_ids=values,
        lengths=np.full(num_documents, length),
        spans=np.empty((0, 2), dtype=np.int64),
        num_spans=np.zeros(num_documents, dtype=np.int64),
        num_bytes=np.full(num_documents, 4 * length),
        record_ids=np.zeros(num_documents, dtype="V16"),
    )
    pieces = [columns.where(np.arange(num_documents) // 250 == part) for part in range(num_documents // 250)]
    for _ in range(7):
        started = time.perf_counter()
        for start in starts:
            found.tokens(int(start), int(start) + BLOCK_SIZE)
        times["read"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for start in starts:
            np.asarray(flat[start : start + BLOCK_SIZE]).astype(np.int64)
        times["read_flat"].append(time.perf_counter() - started)
        started = time.perf_counter()
        writer = tokens.ShardWriter(folder / "written.arrow", tokens.schema_for(1 << 14))
        for piece in pieces:
            writer.add(piece)
        writer.close()
        times["write"].append(time.perf_counter() - started)
        started = time.perf_counter()
        with open(folder / "written.bin", "wb") as stream:
            for piece in pieces:
                piece.input_ids.tofile(stream)
        times["write_flat"].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


CONTENDERS = {"ours": ours, "datasets": with_datasets, "encode_batch": encode_batch}


def run_apart(name: str, folder: Path) -> dict:
    """One contender in a fresh process; its last line is its result."""
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=25)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps({**CONTENDERS, "ids": ids_digests, "store": store}[options.contender](options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.megabytes * 10**6)
        source = f"sources=[{{path: {folder}/corpus.jsonl}}]"
        load_script("train_tokenizer").main(
            [f"output_dir={folder}/tokenizer", source, f"vocab_size={options.vocab_size}"]
        )
        results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
        for _ in range(options.repeats):
            for contender in CONTENDERS:
                results[contender].append(run_apart(contender, folder))
        report(results, run_apart("ids", folder), run_apart("store", folder), (folder / "corpus.jsonl").stat().st_size)


def report(results: dict[str, list[dict]], ids: dict, stored: dict, num_bytes: int) -> None:
    versions = {
        name: importlib.metadata.version(name) for name in ("tokenizers", "tiktoken", "datasets", "pyarrow", "numpy")
    }
    print(
        f"python {sys.version.split()[0]}  {versions}  {len(os.sched_getaffinity(0))} cores  {num_bytes / 1e6:.1f} MB"
    )
    rates, sizes = {}, {}
    for name, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        rates[name] = runs[0]["num_tokens"] / seconds
        sizes[name] = runs[0]["num_bytes"] / runs[0]["num_tokens"]
        times = " ".join(f"{run['seconds']:.2f}" for run in runs)
        rate = f"{rates[name]:>12,.0f} tokens/s  {num_bytes / 1e6 / seconds:6.2f} MB/s"
        print(f"{name:<13} {rate}  {sizes[name]:5.2f} bytes a token  ({times} s)")
    share = statistics.median(run["split_share"] for run in results["ours"])
    engine = results["ours"][0]["engine"]
    print(f"{ids['num_documents']} documents, same ids: {ids['ours'] == ids['tokenizers']}; ours encodes with {engine}")
    print(f"ours / datasets      {rates['ours'] / rates['datasets']:.2f} (bar 4)")
    print(f"ours / encode_batch  {rates['ours'] / rates['encode_batch']:.2f} (bar 2)")
    print(f"bytes a token: ours / datasets  1/{sizes['datasets'] / sizes['ours']:.1f} (bar 1/8)")
    print(f"splits and duplicates  {share:.1%} of the CPU time of preparation (bar 15 %)")
    print(f"reading 1,024-token blocks: store / memmap  {stored['read'] / stored['read_flat']:.2f} (bar 1.5)")
    print(f"writing: flat file / store  {stored['write_flat'] / stored['write']:.2f} (bar 0.8)")


if __name__ == "__main__":
    main()
