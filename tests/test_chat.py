"""Conversations: their framing, what of them is learnt, and preferences between answers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import ASSISTANT, Encoder, chat_tokens, frame
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.corpus.sources import Files, Skipped
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.engine import run, silent
from pretrain.objectives.preference.dpo import log_probabilities
from pretrain.surgery import Inputs

TURNS = [
    ("system", "be brief"),
    ("user", "import os"),
    (ASSISTANT, "return 1"),
    ("user", "class A"),
    (ASSISTANT, "pass"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def messages(turns):
    return [{"role": role, "content": words} for role, words in turns]


def examples(*columns):
    return [Example(c, 0, number) for number, c in enumerate(columns)]


@pytest.fixture(scope="module")
def chatty(prepared):
    """A model and a tokenizer with the marks and the template of "chatml"."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    model = new_model("llama", SIZES, task="causal", vocabulary=Vocabulary.of(tokenizer), seed=0).eval()
    inputs = Inputs(tokenizer=tokenizer)
    method_class("chat_template")()(model, inputs)
    return model, inputs.extra["tokenizer"], tokenizer


@pytest.fixture(scope="module")
def context(chatty):
    return Context(Vocabulary.of(chatty[1]), 96, np.random.default_rng(0), encoder=Encoder(chatty[1]))


# The template


def test_the_template_adds_its_marks_and_leaves_all_else_as_it_was(chatty, prepared) -> None:
    model, tokenizer, old = chatty
    assert len(tokenizer) == len(old) + 2 == len(model.get_input_embeddings().weight)
    start, stop = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows_VE = model.get_input_embeddings().weight
    mean_E = rows_VE[: len(old)].double().mean(0).float()
    assert torch.equal(rows_VE[start], mean_E) and torch.equal(rows_VE[stop], mean_E)
    assert tokenizer.eos_token_id == stop and frame(tokenizer) == frame(old)
    assert model.generation_config.eos_token_id[0] == stop
    text = "def f(): <|im_start|> return"
    assert Encoder(old).ids([text])[0] == Encoder(tokenizer).ids([text])[0]  # a mark in a text is text


def test_a_checkpoint_with_the_template_opens_in_transformers_and_frames_alike(chatty, tmp_path) -> None:
    model, tokenizer, old = chatty
    checkpoint.save(model, tokenizer, tmp_path / "c")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    ours, _ = Encoder(tokenizer).conversation(TURNS)
    assert theirs.apply_chat_template(messages(TURNS), return_dict=False) == ours
    prompt = theirs.apply_chat_template(messages(TURNS[:2]), add_generation_prompt=True, return_dict=False)
    assert Encoder(tokenizer).conversation(TURNS[:2], answering=True)[0] == prompt
    before, rest = chat_tokens(tokenizer, TURNS[1][1], TURNS[0][1])
    assert [*before, *rest] == prompt
    again, its = checkpoint.load(tmp_path / "c")
    assert frame(its) == frame(old)
    tokens = torch.tensor([ours])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(plain(tokens).logits, again(tokens).logits)


def test_headings_need_no_new_token(prepared) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    model = new_model("llama", SIZES, task="causal", vocabulary=Vocabulary.of(tokenizer), seed=0)
    inputs = Inputs(tokenizer=tokenizer)
    method_class("chat_template")(template="headings")(model, inputs)
    made = inputs.extra["tokenizer"]
    assert made.get_vocab() == tokenizer.get_vocab() and tokenizer.chat_template is None
    end = made.eos_token
    begin = made.bos_token or ""
    assert made.apply_chat_template(messages(TURNS[1:3]), tokenize=False) == (
        f"{begin}### User:\nimport os\n\n### Assistant:\nreturn 1{end}\n\n"
    )
    ids, answer = Encoder(made).conversation(TURNS[1:3])
    learnt = [token for token, number in zip(ids, answer, strict=True) if number == 0]
    assert learnt == [*Encoder(made).ids(["return 1"])[0], made.eos_token_id]


def test_a_template_that_is_there_stays_unless_it_is_to_be_replaced(chatty) -> None:
    model, tokenizer, _ = chatty
    inputs = Inputs(tokenizer=tokenizer)
    assert method_class("chat_template")(template="headings")(model, inputs) is model and not inputs.extra
    method_class("chat_template")(template="headings", replace=True)(model, inputs)
    assert "### User" in inputs.extra["tokenizer"].apply_chat_template(messages(TURNS), tokenize=False)


def test_what_is_no_template_is_one_clear_error(prepared, tiny, tmp_path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(PretrainError, match="accepted: chatml, headings, or a file"):
        method_class("chat_template")(template="alpaca")(tiny("llama", vocab_size=512), Inputs(tokenizer=tokenizer))
    with pytest.raises(PretrainError, match="leaves out a message of 'assistant'"):
        method_class("chat_template")(template=str(tmp_path / "mine.jinja"))(
            tiny("llama", vocab_size=512), Inputs(tokenizer=tokenizer)
        )
    with pytest.raises(PretrainError, match="has no tokenizer"):
        method_class("chat_template")()(tiny("llama"), Inputs())


# What is learnt


def test_only_answers_and_their_ends_are_learnt(chatty, context) -> None:
    tokenizer = chatty[1]
    batch = method_class("chat")().prepare(examples({"messages": messages(TURNS)}), context)
    target_L = batch["target_BL"][0]
    plain = [Encoder(tokenizer).ids([words])[0] for words in ("return 1", "pass")]
    stop = tokenizer.eos_token_id
    assert target_L[target_L != -100].tolist() == [*plain[0], stop, *plain[1], stop]
    tokens_L = batch["tokens_BL"][0]
    learnt_L = target_L != -100
    assert torch.equal(tokens_L[1:][learnt_L[:-1]], target_L[learnt_L])
    assert batch["weight"] == learnt_L.sum() and batch["tokens"] == len(Encoder(tokenizer).conversation(TURNS)[0])


def test_the_loss_is_that_of_transformers_for_the_same_labels(chatty, context) -> None:
    model, objective = chatty[0], method_class("chat")()
    some = examples({"messages": messages(TURNS)}, {"messages": messages(TURNS[1:3])})
    with torch.no_grad():
        found = objective.loss(model, objective.prepare(some, context)).value
        total, count = 0.0, 0
        for example in some:
            batch = objective.prepare([example], context)
            labels = torch.cat([torch.full((1, 1), -100), batch["target_BL"][:, :-1]], 1)
            mask = (batch["document_BL"] > 0).long()
            number = int(batch["weight"])
            total += model(batch["tokens_BL"], attention_mask=mask, labels=labels).loss * number
            count += number
    assert found.item() == pytest.approx((total / count).item(), rel=1e-5)


def test_conversations_share_a_row_where_they_fit_and_none_sees_another(chatty, context) -> None:
    model, objective = chatty[0], method_class("chat")()
    columns = [
        {"messages": messages([("user", f"import {name}"), (ASSISTANT, f"return {name}")])}
        for name in ("os", "sys", "re", "io")
    ]
    batch = objective.prepare(examples(*columns), context)
    assert len(batch["tokens_BL"]) < 4 and batch["document_BL"].max() > 1
    alone = [objective.loss(model, objective.prepare(examples(column), context)) for column in columns]
    weights = [int(objective.prepare(examples(column), context)["weight"]) for column in columns]
    mean = sum(loss.value.item() * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert objective.loss(model, batch).value.item() == pytest.approx(mean, rel=1e-5)


def test_what_is_too_long_keeps_an_answer(chatty, context) -> None:
    objective, short = method_class("chat")(), replace(context, length=24)
    long = "import os, sys, re, json, abc, ast, io, math, time, enum, types, typing, string, random, pickle " * 3
    first = objective.prepare(examples({"messages": messages([("user", "a"), (ASSISTANT, long)])}), short)
    assert (
        first["tokens"] == 24
        and first["weight"] > 5
        and first["tokens_BL"][0, 0] == chatty[1].convert_tokens_to_ids("<|im_start|>")
    )
    last = objective.prepare(examples({"messages": messages([("user", long), (ASSISTANT, "pass")])}), short)
    assert last["tokens"] == 24 and last["target_BL"][0].max() == chatty[1].eos_token_id


def test_columns_of_prompts_and_answers_are_a_conversation_of_two(chatty, context) -> None:
    some = {"text": "import os", "target": "return 1"}
    objective = method_class("chat")(messages=None, system="be brief")
    assert objective.columns == ("text", "target")
    batch = objective.prepare(examples(some), context)
    whole = method_class("chat")().prepare(examples({"messages": messages(TURNS[:3])}), context)
    assert torch.equal(batch["tokens_BL"], whole["tokens_BL"]) and torch.equal(batch["target_BL"], whole["target_BL"])
    assert objective.expected(examples(some), context) == ["return 1"]


def test_answers_are_what_transformers_generates_after_the_template(chatty, context) -> None:
    model, tokenizer, _ = chatty
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.1
    objective = method_class("chat")(answer=8)
    some = examples({"messages": messages(TURNS)}, {"messages": messages(TURNS[1:3])})
    found = objective.predictions(model, some, context)
    for example, text in zip(some, found, strict=True):
        turns = objective.turns(example)[:-1]
        ids = tokenizer.apply_chat_template(
            messages(turns), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        new = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_conversation_that_is_none_is_one_clear_error(chatty, context, prepared) -> None:
    objective = method_class("chat")()
    with pytest.raises(PretrainError, match="document 0: column 'messages' holds no conversation"):
        objective.prepare(examples({"messages": "hello"}), context)
    with pytest.raises(PretrainError, match="no answer of the assistant"):
        objective.prepare(examples({"messages": messages([("user", "a")])}), context)
    plain = Encoder(load_tokenizer(prepared / "tokenizer"))
    with pytest.raises(
        PretrainError, match=r"no chat template: accepted: one that has, or surgeries: \[chat_template\]"
    ):
        objective.prepare(examples({"messages": messages(TURNS)}), replace(context, encoder=plain))
    with pytest.raises(PretrainError, match="is no decoder"):
        objective.ready(
            new_model(
                "t5",
                {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4},
                task="seq2seq",
                vocabulary=context.vocabulary,
            ),
            (),
            context.vocabulary,
            0,
        )


# Preferences


PAIR = {"text": "import os", "chosen": "return 1", "rejected": "pass; pass"}


def by_hand(model, tokenizer, turns):
    """The log-probability of the last answer and its end, and how many tokens they are, by plain transformers."""
    whole = tokenizer.apply_chat_template(messages(turns), return_tensors="pt", return_dict=False)
    start = len(tokenizer.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True, return_dict=False))
    stop = start + len(Encoder(tokenizer).ids([turns[-1][1]])[0]) + 1
    with torch.no_grad():
        log_p_LV = model(whole).logits[0].log_softmax(-1)
    return sum(log_p_LV[place - 1, whole[0, place]].item() for place in range(start, stop)), stop - start


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_the_loss_is_the_papers_of_log_probabilities_by_transformers(chatty, context, loss_type) -> None:
    first, tokenizer, _ = chatty
    model = copy.deepcopy(first)
    torch.manual_seed(2)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.05
    objective = method_class("dpo")(beta=0.3, loss_type=loss_type, label_smoothing=0.1 if loss_type == "sigmoid" else 0)
    teacher = objective.modules(first)
    pairs = [PAIR, {"text": "class A", "chosen": "pass", "rejected": "x = 1"}]
    values, margins = [], []
    for pair in pairs:
        reward, lengths = {}, {}
        for side in ("chosen", "rejected"):
            turns = [("user", pair["text"]), (ASSISTANT, pair[side])]
            (ours, lengths[side]), (theirs, _) = by_hand(model, tokenizer, turns), by_hand(first, tokenizer, turns)
            reward[side] = 0.3 * (ours - theirs)
        d = reward["chosen"] - reward["rejected"]
        if loss_type == "sigmoid":
            values.append(0.9 * np.log1p(np.exp(-d)) + 0.1 * np.log1p(np.exp(d)))
        elif loss_type == "ipo":
            d = reward["chosen"] / lengths["chosen"] - reward["rejected"] / lengths["rejected"]
            values.append((d / 0.3 - 1 / 0.6) ** 2)
        else:
            values.append(max(0.0, 1 - d))
        margins.append(d)
    loss = objective.loss(model, objective.prepare(examples(*pairs), context), teacher)
    assert loss.value.item() == pytest.approx(np.mean(values), rel=1e-4)
    assert loss.parts["margin"].item() == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-5)
    assert loss.parts["accuracy"].item() == np.mean(np.array(margins) > 0)


def test_the_model_as_it_is_at_first_has_no_margin_and_the_loss_of_a_coin(chatty, context) -> None:
    model, objective = chatty[0], method_class("dpo")()
    loss = objective.loss(model, objective.prepare(examples(PAIR), context), objective.modules(model))
    assert loss.value.item() == pytest.approx(np.log(2), abs=1e-6) and loss.parts["margin"].item() == 0


def test_conversations_and_texts_are_the_same_pair(chatty, context) -> None:
    objective = method_class("dpo")()
    turns = {side: messages([("user", PAIR["text"]), (ASSISTANT, PAIR[side])]) for side in ("chosen", "rejected")}
    one, other = (objective.prepare(examples(pair), context) for pair in (PAIR, {"text": "-", **turns}))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_template_a_pair_is_prompt_newline_answer_and_end(prepared, context, tiny) -> None:
    encoder = Encoder(load_tokenizer(prepared / "tokenizer"))
    plain = Context(Vocabulary.of(encoder.tokenizer), 64, np.random.default_rng(0), encoder=encoder)
    batch = method_class("dpo")().prepare(examples(PAIR), plain)
    begin = [] if plain.vocabulary.before is None else [plain.vocabulary.before]
    prompt, chosen = encoder.ids(["import os\n", "return 1"])
    whole = [*begin, *prompt, *chosen, plain.vocabulary.eos]
    assert batch["tokens_BL"][0, : len(whole)].tolist() == whole
    target_L = batch["target_BL"][0]
    assert target_L[target_L != -100].tolist() == [*chosen, plain.vocabulary.eos]
    model = tiny("llama", vocab_size=512)
    log_p_B = log_probabilities(model, batch)
    assert log_p_B.shape == (2,) and (log_p_B < 0).all()


def test_what_is_too_long_keeps_the_end_of_the_prompt_and_the_answer(chatty, context) -> None:
    pair = PAIR | {"text": "import os, sys, re, json, abc, ast, io, math, time, enum, types, typing " * 4}
    batch = method_class("dpo")().prepare(examples(pair), replace(context, length=32))
    assert batch["tokens_BL"].shape[1] == 32
    short = method_class("dpo")().prepare(examples(PAIR), context)
    assert (batch["target_BL"] != -100).sum() == (short["target_BL"] != -100).sum()


def test_pairs_that_are_none_are_one_clear_error(chatty, context) -> None:
    objective = method_class("dpo")()
    with pytest.raises(PretrainError, match="document 0: column 'rejected': accepted: a text, or a list"):
        objective.prepare(examples(PAIR | {"rejected": messages([("user", "a")])}), context)
    with pytest.raises(PretrainError, match=r"label_smoothing 0.1: accepted: below 0.5, with loss_type sigmoid"):
        method_class("dpo")(loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(PretrainError, match="the reference is missing"):
        objective.loss(chatty[0], objective.prepare(examples(PAIR), context))


# A whole recipe


def test_a_source_keeps_whole_conversations(tmp_path) -> None:
    chats = [TURNS, TURNS[1:3], [("user", "nobody answers")]]
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"messages": messages(chat), "id": n}) for n, chat in enumerate(chats))
    )
    skipped = Skipped()
    whole = list(Files(str(tmp_path / "c.jsonl"), text="messages", conversations="whole").documents(skipped))
    assert [document["messages"] for document in whole] == [messages(TURNS), messages(TURNS[1:3])]
    assert whole[1]["text"] == "user: import os\n\nassistant: return 1" and [d["id"] for d in whole] == ["0", "1"]
    assert len(list(Files(str(tmp_path / "c.jsonl"), text="messages").documents(Skipped()))) == 3  # an answer each


RECIPE = """\
name: chat
seed: 1
stages:
  - {{name: texts, stage: data, sources: [{{files: {texts}}}], validation: 0.1, test: 0.1}}
  - {{name: chats, stage: data, sources: [{{files: {chats}, text: messages, conversations: whole}}], validation: 0.1, test: 0.1}}
  - {{name: pairs, stage: data, sources: [{{files: {pairs}}}], validation: 0.1, test: 0.1}}
  - {{name: tokenizer, stage: tokenizer, corpus: texts, vocab_size: 400}}
  - name: base
    stage: train
    corpus: texts
    tokenizer: tokenizer
    model: {{family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
    length: 64
    batch_rows: 4
    optimizer: {{method: adamw, lr: 5e-3}}
    budget: {{steps: 10}}
  - name: tuned
    stage: train
    corpus: chats
    init: base
    surgeries: [chat_template]
    objective: {{method: chat, answer: 8}}
    length: 64
    batch_rows: 8
    optimizer: {{method: adamw, lr: 2e-2}}
    budget: {{epochs: 12}}
  - name: preferred
    stage: train
    corpus: pairs
    init: tuned
    objective: dpo
    length: 64
    batch_rows: 4
    optimizer: {{method: adamw, lr: 1e-3}}
    budget: {{steps: 8}}
  - {{name: samples, stage: decode, checkpoint: tuned, prompts: [the colour red number 90], chat: true, temperature: 0, max_new_tokens: 8}}
  - {{name: evaluation, stage: evaluate, checkpoint: tuned, corpus: chats, evaluations: [{{method: task, objective: {{method: chat, answer: 8}}}}], compressors: false}}
"""


def test_a_base_becomes_one_that_answers_and_prefers(tmp_path, stories) -> None:
    (tmp_path / "texts").mkdir()
    for number, story in enumerate(stories[:20]):
        (tmp_path / "texts" / f"{number}.txt").write_text(story["text"][:1500])
    colours = ("red", "blue")
    chats = [
        [("user", f"the colour {colours[n % 2]} number {n}"), (ASSISTANT, f"it is {colours[n % 2]}")] for n in range(80)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": messages(chat)}) for chat in chats))
    pairs = [{"text": chat[0][1], "chosen": chat[1][1], "rejected": f"no, {n}"} for n, chat in enumerate(chats)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(texts=tmp_path / "texts", chats=tmp_path / "chats.jsonl", pairs=tmp_path / "pairs.jsonl")
    )
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    metrics = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert metrics["exact_match"] > 0.5
    (sample,) = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())["samples"]
    assert sample["continuation"] == "it is red"
    rows = [json.loads(line) for line in (tmp_path / "run" / "preferred" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[-1] < losses[0]
    _, tokenizer = checkpoint.load(tmp_path / "run" / "preferred" / "checkpoint")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
