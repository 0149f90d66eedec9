"""Reads a run's tb/ folder with the real tensorboard package and compares it with metrics.jsonl.

    pip install tensorboard
    python benches/peers/tensorboard_read.py outputs/quickstart

Every scalar must be there once per step, resumed or not, with the value of metrics.jsonl to f32.
"""

import json
import struct
import sys
from pathlib import Path

import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train/tokens": "tokens",
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
    "eval/val_loss": "val_loss",
    "eval/bits_per_byte": "bits_per_byte",
    "system/memory_bytes": "memory_bytes",
    "train/backward_passes": "backward_passes",
    "train/flops": "flops",
    "train/train_seconds": "train_seconds",
}


def f32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def main(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = sorted(path.name for path in (run / "tb").iterdir())
    print(f"tensorboard {tensorboard.__version__}; {len(files)} files: {', '.join(files)}")
    # 0 keeps every point; the default is a sample.
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) <= set(TAGS), tags["scalars"]
    for tag, column in TAGS.items():
        wanted = [(row["step"], f32(row[column])) for row in rows if column in row]
        found = [(event.step, event.value) for event in events.Scalars(tag)] if wanted else []
        assert found == wanted, f"{tag}: {found} instead of {wanted}"
        print(f"{tag}: {len(found)} points, as metrics.jsonl")
    for tag in sorted(tags["tensors"]):
        texts = events.Tensors(tag)
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == "text"
        last = texts[-1].tensor_proto.string_val[0].decode()
        print(f"{tag}: {len(texts)} texts at steps {[t.step for t in texts]}; begins {last[:40]!r}")


main(Path(sys.argv[1]))
