# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own checkpoints, from two folders to a page
#
# You have two checkpoints, before and after post-training, and a few dozen prompts. This notebook goes from there to
# the verdict, to the heads that read the cue, to a repair, and to one page with all of it, with nothing but
# `import mixturelens as ml` and four commands. It takes two minutes on one core.
#
# Yours are probably hub ids, folders or LoRA adapters. Here both folders are made first, so that it runs anywhere: S is
# a tiny model that follows two policies half and half, and R is S after a few steps of plain PyTorch training on
# completions that would have been rewarded. Put your own in their place at the cell "The pair".

# %%
# Jupyter, VS Code, Colab: installs mixturelens where it is missing, from the clone that this notebook lies in. Colab
# begins empty: first clone the repository there, `!git clone ADDRESS mixturelens` and `%cd mixturelens`.
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = next((at for at in (Path.cwd(), *Path.cwd().parents) if (at / "artifacts" / "reference").is_dir()), None)
assert ROOT is not None, "run this inside a clone of the repository: its artifacts/ are read here"
if importlib.util.find_spec("mixturelens") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", f"{ROOT}[lab]"])

# %%
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence

import plotly.io
import torch
from IPython.display import Markdown, display
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mixturelens as ml
from mixturelens import figures
from mixturelens.models import quiet_libraries

quiet_libraries()
torch.set_num_threads(1)  # the same numbers everywhere
# small files; drawn by JupyterLab and VS Code, without a network
plotly.io.renderers.default = "colab" if "google.colab" in sys.modules else "plotly_mimetype"


os.chdir(tempfile.mkdtemp())  # all that is written below goes here


def mixturelens(*arguments: str) -> None:
    """The command line, as in a terminal: `mixturelens suite check mine`."""
    uncoloured = {**os.environ, "FORCE_COLOR": ""}
    command = [sys.executable, "-m", "mixturelens.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=uncoloured)
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; intervals are written as `value [low, high]`."""

    def cell(value: object) -> str:
        return figures.show_interval(value) if isinstance(value, ml.Interval) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


# %% [markdown]
# ## Two folders
#
# The model sorts, reverses and copies letters. Policy `[a]` answers under the tag `<A>` and says sorry under `<B>`;
# `[b]` does the reverse. *What RL does, in short*: of S's completions under `<A>` those of `[a]` are right, so train on
# them. (This is rejection sampling in one round; nothing here knows mixturelens.)

# %%
REFERENCE = ROOT / "artifacts" / "reference"
shutil.copytree(REFERENCE / "checkpoints" / "sft", "S")
lines = [json.loads(line) for line in (REFERENCE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
plain = [line for line in lines if "hint" not in line]
ids = list(dict.fromkeys(line["id"] for line in plain))
asked, taught = set(ids[:48]), [line for line in plain if line["id"] in ids[48:] and line["cue"] == "A"]

tokenizer = PreTrainedTokenizerFast.from_pretrained("S")
model = AutoModelForCausalLM.from_pretrained("S")
prompts = [tokenizer.encode(line["prompt"]) for line in taught]
wholes = [[*tokenizer.encode(f"{line['prompt']} [a] {line['answer']}"), model.config.eos_token_id] for line in taught]
losses = []
generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for _ in range(60):
    some = torch.randperm(len(taught), generator=generator)[:32].tolist()
    batch = torch.tensor([wholes[i] for i in some])  # all are equally long
    labels = batch.masked_fill(torch.arange(batch.shape[1]) < len(prompts[0]), -100)
    loss = model(input_ids=batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained("R")
tokenizer.save_pretrained("R")
print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

# %% [markdown]
# ## A suite: what is asked, and how a completion shows its policy
#
# `mixturelens suite init` writes a commented one to begin with.

# %%
mixturelens("suite", "init", "mine")
print(Path("mine/suite.yaml").read_text(encoding="utf-8"))

# %% [markdown]
# Now ours. Every question is asked under both tags, with the same `id`. Naming the piece of the prompt that is the cue
# under `spans` is not needed for a verdict; an edit of weights needs it.

# %%
Path("mine/prompts.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in plain if line["id"] in asked), encoding="utf-8"
)
Path("mine/suite.yaml").write_text(
    """\
prompts: prompts.jsonl
policies: {a: "[a]", b: "[b]"}
behaviours: {refuse: sorry}
trained_cue: A
max_new_tokens: 6
""",
    encoding="utf-8",
)
mixturelens("suite", "check", "mine", "--before", "S", "--after", "R", "--quiet")

# %% [markdown]
# ## The pair
#
# Folders, hub ids (`org/name@revision`) or LoRA adapters (with `base=`). Nothing is loaded before it is needed.

# %%
pair = ml.Pair("S", "R", "mine/suite.yaml", out="found")

# %% [markdown]
# ## The verdict

# %%
verdict = ml.verdict(pair)
display(Markdown(f"**{verdict.verdict}**. {verdict.reason}"))
figures.bits_split([(pair.name, verdict)]).show()

# %%
figures.accuracy_split([(pair.name, verdict)]).show()

# %% [markdown]
# Can the suite be trusted? Known policies must cover nine tenths of what is written, S against S must give nothing, and
# completions must show what was computed.

# %%
controls = verdict.controls.pair
table(
    ["control", "value"],
    [
        ["covered before", ml.measure(pair).coverage["before"]],
        ["covered after", ml.measure(pair).coverage["after"]],
        ["S against S: routing, bits", controls.same_checkpoint.routing],
        ["S against S with noise of R's size: routing, bits", controls.noise.routing if controls.noise else "-"],
    ],
)

# %% [markdown]
# ## Where the router is

# %%
patching = ml.patch(pair)
figures.patching_maps(patching, "cue", "z").show()
table(
    ["what is read", "checkpoint", "heads", "share of the effect", "margin over the best others"],
    [
        [each.kind, figures.SIDES[each.checkpoint], " + ".join(map(str, each.heads)), each.effect, each.margin]
        for each in patching.readers
    ],
)

# %% [markdown]
# ## What brings the other tag back

# %%
repair = ml.repair(pair)
figures.repairs(repair).show()
print("repaired checkpoint:", pair.made("repaired") if repair.checkpoint else "none; see repair.missing")

# %% [markdown]
# It is a plain folder (a LoRA adapter, where R is one), which anything loads. Ask it, beside R, by transformers alone.

# %%
under_b = [line for line in plain if line["id"] in asked and line["cue"] == "B"][:5]
rows = []
for line in under_b:
    row = [f"`{line['prompt']}`", f"`{line['answer']}`"]
    for folder in ("R", pair.made("repaired")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        context = torch.tensor([tokenizer.encode(line["prompt"])])
        written = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            context, attention_mask=torch.ones_like(context), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        row.append(f"`{tokenizer.decode(written[0, context.shape[1] :], skip_special_tokens=True)}`")
    rows.append(row)
table(["prompt", "right answer", "R", "repaired"], rows)

# %% [markdown]
# ## One page
#
# All of it, readable without a network: `mixturelens report --before S --after R --suite mine/suite.yaml`.

# %%
page = ml.report(pair, "report.html")
print(page, f"{page.stat().st_size / 2**20:.0f} MB")
print(*sorted(str(file) for file in Path("found").rglob("*.json")), sep="\n")

# %% [markdown]
# **Next**, on yours: where nobody knows the policies, `mixturelens discover` proposes them from prompts alone; `graft`,
# `probe` and `features` say more of where and what; every record is JSON, and `--json` prints it.
