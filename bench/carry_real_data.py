"""A small folder of real data and the real tokenizer, for a machine that has neither.

    python bench/carry_real_data.py DATA_FOLDER OUTPUT [--records 2500]

DATA_FOLDER has `gsm8k/train.jsonl.gz`, `dolly_6400/dolly_6400.jsonl.gz` and `qwen3_tokenizer/hf/`. OUTPUT gets
`gsm8k.jsonl.gz` and `dolly.jsonl.gz` with the first records of each, at most 3 MB together, and `tokenizer/`.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

SOURCES = {"gsm8k.jsonl.gz": "gsm8k/train.jsonl.gz", "dolly.jsonl.gz": "dolly_6400/dolly_6400.jsonl.gz"}
TOKENIZER = "qwen3_tokenizer/hf"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
MAX_BYTES = 3_000_000


def carry(data: Path, output: Path, *, num_records: int) -> None:
    """Raises SystemExit when DATA_FOLDER lacks a file, or the sample is larger than 3 MB."""
    wanted = [data / name for name in (*SOURCES.values(), f"{TOKENIZER}/tokenizer.json")]
    if missing := [str(path) for path in wanted if not path.exists()]:
        raise SystemExit(f"not there: {', '.join(missing)}")
    (output / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        with gzip.open(data / source, "rb") as lines:
            # Without a date, so that the same records are the same bytes.
            (output / name).write_bytes(gzip.compress(b"".join(islice(lines, num_records)), mtime=0))
    for name in TOKENIZER_FILES:
        if (data / TOKENIZER / name).exists():
            shutil.copyfile(data / TOKENIZER / name, output / "tokenizer" / name)
    num_bytes = sum((output / name).stat().st_size for name in SOURCES)
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"{num_bytes:,} bytes of records are more than {MAX_BYTES:,}: take fewer (--records)")
    print(f"{num_bytes:,} bytes of records and the tokenizer in {output}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--records", type=int, default=2500, help="of each set")
    arguments = parser.parse_args(argv)
    carry(arguments.data, arguments.output, num_records=arguments.records)


if __name__ == "__main__":
    main()
