"""bert2BERT's first stage: what a step trains, what it costs, and that it survives processes and resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.policies.pruning.sub_structure import SubStructure
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train


class Watch(SubStructure):
    """Notes after each step which weights it moved, and what it spent."""

    def after_step(self, training, state, batches, losses):
        now = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        before, self.seen[1] = self.seen[1], now
        if before is not None:
            moved = {n for n in now if not torch.equal(now[n], before[n])}
            self.seen[0].append((tuple(state["window"]), moved, training.flops))

    name = "sub_structure"


def run(prepared, tiny, folder, policies, *, family="llama", steps=8, save_every=0, micro=0, **fields):
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    objective = MaskedLM() if family == "bert" else CausalLM()
    loader = Loader(
        Shards(prepared / "tokens" / "train"), [objective], vocabulary, length=64, batch_rows=4, micro_rows=micro or None,
        workers=0,
    )  # fmt: skip
    depth = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    model = tiny(family, vocab_size=512, **depth | fields)
    settings = Settings(budget=Budget(steps=steps), save_every=save_every, bar=False, precision="float32")
    return train(model, loader, [objective], AdamW(lr=1e-2), Constant(), settings, folder, policies=policies)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}),
        ("gpt2", {}), ("bert", {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_a_step_moves_the_top_of_its_sub_model_and_the_head_and_nothing_else(tiny, prepared, tmp_path, family, fields):
    policy = Watch(layers=2, share=0.75)
    object.__setattr__(policy, "seen", [[], None])
    training = run(prepared, tiny, tmp_path, [policy], family=family, steps=12, micro=2, **fields)
    windows = {window for window, _, _ in policy.seen[0]}
    assert windows == {(0, 2), (2, 4), (0, 4)}
    tied = training.model.get_output_embeddings().weight is training.model.get_input_embeddings().weight
    container = {"llama": "layers.", "gpt2": "h.", "bert": "encoder.layer."}[family]
    for (begin, end), moved, _ in policy.seen[0]:
        numbers = {int(n.split(container)[1].split(".")[0]) for n in moved if container in n}
        assert numbers == set(range(begin, end))
        table = [n for n in moved if "embed" in n or "wte" in n or "wpe" in n]
        if (begin, end) == (0, 4):
            assert table
        else:
            assert all(tied and ("embed_tokens" in n or "wte" in n) for n in table)
        assert any(n.endswith(("norm.weight", "ln_f.weight", "transform.dense.weight")) for n in moved)


def test_the_meter_counts_each_depth_for_itself(tiny, prepared, tmp_path):
    policy = Watch(layers=1, share=0.9)
    object.__setattr__(policy, "seen", [[], None])
    run(prepared, tiny, tmp_path, [policy], steps=24)
    cost = {}
    for (_, _, before), (window, _, after) in zip(policy.seen[0], policy.seen[0][1:], strict=False):
        cost.setdefault(window, set()).add(after - before)
    assert all(max(found) < 1.01 * min(found) for found in cost.values())  # they differ by their numbers of targets
    by_top = [sum(cost[window]) / len(cost[window]) for window in [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]]
    assert by_top == sorted(by_top) and len(set(by_top)) == 5
    forward = by_top[1] - by_top[0]  # of a block
    assert by_top[2] - by_top[1] == pytest.approx(forward, rel=0.1)
    assert by_top[4] - by_top[3] == pytest.approx(6 * forward, rel=0.1)  # three backward passes, twice as much each


@pytest.mark.bits
def test_evaluation_is_of_the_whole_model_and_a_window_of_all_is_plain_training(tiny, prepared, tmp_path):
    tokens = torch.arange(3, 23)[None]
    training = run(prepared, tiny, tmp_path / "a", [SubStructure(layers=2, share=1.0)], steps=3)
    model = training.model.eval()
    training.state["sub_structure"]["window"] = [0, 2]
    cut = model(tokens).logits
    training.state["sub_structure"]["window"] = [0, 4]
    assert torch.equal(model(tokens).logits, cut)
    one = run(prepared, tiny, tmp_path / "b", [SubStructure(layers=4, share=0.0)], steps=3).model
    other = run(prepared, tiny, tmp_path / "c", [], steps=3).model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_nothing_is_sent_back_below_the_blocks_that_are_trained(tiny, prepared, tmp_path):
    tokens = torch.arange(3, 23)[None]
    training = run(prepared, tiny, tmp_path, [SubStructure(layers=2, share=1.0)], steps=1, tie_word_embeddings=True)
    model = training.model.train()
    for window in ([0, 2], [2, 4]):
        training.state["sub_structure"]["window"] = window
        model.zero_grad()
        model.model(tokens).last_hidden_state.sum().backward()
        reached = {n.split(".")[1] for n, p in model.model.named_parameters() if p.grad is not None and "layers" in n}
        assert reached == {str(i) for i in range(*window)}
        assert model.model.embed_tokens.weight.grad is None and model.model.norm.weight.grad is not None


JOB = """if True:
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_sub_structure
    test_sub_structure.job(Path(sys.argv[1]), Path(sys.argv[2]))"""


def job(folder, prepared):
    """The common job of the tests of several processes, with this policy."""
    import training_job

    policies, plain = [SubStructure(layers=1, share=0.7)], training_job.train
    training_job.train = lambda *args, **fields: plain(*args, **fields, policies=policies)
    try:
        training_job.main(folder, prepared, 6, "ddp", 0.0)
    finally:
        training_job.train = plain


@pytest.mark.processes
def test_two_processes_train_to_the_weights_of_one(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    script = tmp_path / "job.py"
    script.write_text(JOB.format(tests=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run([*launch, str(tmp_path / "2"), str(prepared)], check=True, capture_output=True, timeout=300)
    job(tmp_path / "1", prepared)
    one, two = (load_file(tmp_path / size / "checkpoint" / "model.safetensors") for size in ("1", "2"))
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-4), name


def test_more_blocks_than_there_are_is_one_clear_line(tiny, prepared, tmp_path):
    with pytest.raises(PretrainError, match="layers 5: accepted: from 1 to the 4 blocks"):
        run(prepared, tiny, tmp_path, [SubStructure(layers=5)])
