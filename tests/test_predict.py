"""`pretrain predict` and `evaluate` by the head: labels, tags, numbers and answers for the rows of a file."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from dataclasses import replace

import pandas
import pyarrow.parquet
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from typer.testing import CliRunner

import pretrain
from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.folders import newest_checkpoint
from pretrain.core.models.heads import LOGARITHMS, NUMBER, with_head
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.inference import rows as reading
from pretrain.inference.heads import evaluation_for, spans
from pretrain.inference.predict import open_head, predict_file, predictions

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [
    "def main(argv=None):",
    "a",
    "b",
    "Return the number of items\nin a list, and some more words",
    "import os " * 9,
]


@pytest.fixture(scope="module")
def words(stories):
    """A tokenizer that frames a text as `[cls] text [sep]` by itself."""
    return train_tokenizer((s["text"] for s in stories), vocab_size=400, mask=True, cls=True)


def config(tokenizer, labels=("no", "yes", "maybe"), **fields):
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    return BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL, **names, **fields)


def saved(model, tokenizer, folder):
    """A folder as `transformers` writes it: nothing of this toolkit is in it."""
    for parameter in model.parameters():  # so that answers differ from text to text
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(words, tmp_path_factory):
    """Plain folders of `transformers`, one for each kind of head."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("plain")
    several = {"problem_type": "multi_label_classification"}
    models = {
        "single": BertForSequenceClassification(config(words)),
        "several": BertForSequenceClassification(config(words, **several)),
        "number": BertForSequenceClassification(config(words, (NUMBER,))),
        "tags": BertForTokenClassification(config(words, ("O", "B-LOC", "I-LOC"))),
        "masked": BertForMaskedLM(config(words)),
        "gpt2": GPT2ForSequenceClassification(
            GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, bos_token_id=3, eos_token_id=4,
                       id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        ),
        "bart": BartForConditionalGeneration(
            BartConfig(vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
                       decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=1,
                       bos_token_id=3, eos_token_id=4, decoder_start_token_id=4, forced_eos_token_id=None)
        ),
    }  # fmt: skip
    return {name: saved(model, words, home / name) for name, model in models.items()}


def predict(*arguments, **more):
    """What the command writes to the screen; its error is raised."""
    outcome = CliRunner().invoke(app, ["predict", *map(str, arguments)], **more)
    if outcome.exception is not None:
        raise outcome.exception
    return outcome.stdout


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alone(place, words, text, pair=None):
    """A text's logits by `transformers` alone."""
    model, _ = checkpoint.load(place)
    with torch.no_grad():
        return model(**words([text], None if pair is None else [pair], return_tensors="pt")).logits[0]


def test_labels_are_those_that_transformers_gives_each_text_alone(places, words):
    rows = pretrain.predict(places["single"], TEXTS, scores=True, batch_size=2)
    for text, row in zip(TEXTS, rows, strict=True):
        p_C = alone(places["single"], words, text).softmax(-1)
        assert row["label"] == ["no", "yes", "maybe"][int(p_C.argmax())]
        assert row["score"] == pytest.approx(float(p_C.max()), abs=1e-5)
        assert list(row["scores"].values()) == pytest.approx(p_C.tolist(), abs=1e-5)
    assert len({row["label"] for row in rows}) > 1  # a model of a single answer would show nothing


def test_pairs_several_labels_and_numbers_too(places, words):
    pairs = [{"text": text, "other": TEXTS[-1 - n]} for n, text in enumerate(TEXTS)]
    for row, pair in zip(pretrain.predict(places["single"], pairs, pair="other"), pairs, strict=True):
        expected = alone(places["single"], words, pair["text"], pair["other"]).softmax(-1)
        assert row["score"] == pytest.approx(float(expected.max()), abs=1e-5)
    for row, text in zip(pretrain.predict(places["several"], TEXTS), TEXTS, strict=True):
        p_C = alone(places["several"], words, text).sigmoid().tolist()
        assert row["labels"] == [name for name, p in zip(("no", "yes", "maybe"), p_C, strict=True) if p >= 0.5]
        assert list(row["scores"].values()) == pytest.approx(p_C, abs=1e-5)
    for row, text in zip(pretrain.predict(places["number"], TEXTS), TEXTS, strict=True):
        assert row == {"value": pytest.approx(float(alone(places["number"], words, text)), rel=1e-4, abs=1e-5)}


def test_of_a_model_that_has_learnt_logarithms_numbers_are_told(places, words, tmp_path):
    model, tokenizer = checkpoint.load(places["number"])
    setattr(model.config, LOGARITHMS, True)
    checkpoint.save(model, tokenizer, tmp_path / "logs")
    for row, text in zip(pretrain.predict(tmp_path / "logs", TEXTS), TEXTS, strict=True):
        assert row["value"] == pytest.approx(float(alone(places["number"], words, text).exp()), rel=1e-4, abs=1e-5)
    evaluation = evaluation_for(model, {}, "price")
    assert evaluation == {"method": "task", "objective": {"method": "regression", "label": "price", "log": True}}


def test_a_causal_classifier_without_a_token_for_padding_reads_each_texts_last_token(places, words):
    rows = pretrain.predict(places["gpt2"], [t for t in TEXTS if t], scores=True)
    for text, row in zip([t for t in TEXTS if t], rows, strict=True):
        p_C = alone(places["gpt2"], words, text).softmax(-1).tolist()
        assert list(row["scores"].values()) == pytest.approx(p_C, abs=1e-5)


def test_tags_have_the_characters_that_they_stand_for(places, words):
    text = "  Ann went\tto New  York"
    (row,) = pretrain.predict(places["tags"], [text])
    assert all(text[tag["start"] : tag["end"]] == tag["text"] for tag in row["tags"])
    tags = ["B-PER", "O", "O", "B-LOC", "I-LOC"]
    assert [(t["tag"], t["text"]) for t in spans(text, tags)] == [("PER", "Ann"), ("LOC", "New  York")]
    assert spans("a bc", ["DET", "NOUN"])[1] == {"tag": "NOUN", "start": 2, "end": 4, "text": "bc"}


@pytest.mark.promise(
    "What others have written",
    "Halves of characters in rows that are predicted are replaced and counted as in corpora, and JSON has null for numbers that it has no words for.",
)
def test_halves_of_characters_and_numbers_without_words_come_out_as_valid_json(places, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a \\ud800 b", "n": NaN, "\\udfff": ["\\ud800", -Infinity]}\n{"text": "plain", "n": 1}\n')
    said = CliRunner().invoke(app, ["predict", str(places["single"]), str(path)])
    assert said.exit_code == 0 and "halves of characters in 1 row are replaced" in said.stderr

    def wrong(word):
        raise AssertionError(word)

    first, second = (json.loads(line, parse_constant=wrong) for line in said.stdout.splitlines())
    assert first["text"] == "a \ufffd b" and first["n"] is None and first["\ufffd"] == ["\ufffd", None]
    assert second["n"] == 1


def test_an_encoder_decoder_of_another_family_answers_as_its_own_generate_does(places, words):
    model, _ = checkpoint.load(places["bart"])
    rows = pretrain.predict(places["bart"], TEXTS[:2])
    for text, row in zip(TEXTS, rows, strict=False):
        inputs = words(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        made = model.generate(**inputs, max_new_tokens=64, do_sample=False, num_beams=1)
        assert row["prediction"] == words.decode(made[0], skip_special_tokens=True).strip()


def test_a_lora_tuned_classifier_predicts_as_the_model_that_was_saved(tiny, words, tmp_path):
    model = with_head(tiny("bert", vocab_size=len(words), max_position_embeddings=64), "sequence", ("bad", "good"),
                      pretrain.core.batch.Vocabulary.of(words))  # fmt: skip
    model = pretrain.methods.LoRA(rank=2, where="all")(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint.save(model.eval(), words, tmp_path / "c", {"made_by": {"name": "x"}, "length": 48})
    rows = pretrain.predict(tmp_path / "c", TEXTS, scores=True)
    with torch.no_grad():
        for text, row in zip(TEXTS, rows, strict=True):
            p_C = model(**words(text, return_tensors="pt")).logits[0].softmax(-1)
            assert list(row["scores"].values()) == pytest.approx(p_C.tolist(), abs=1e-5)


def test_a_model_that_only_continues_text_is_refused_with_what_to_do(places, prepared, tiny, tmp_path):
    from pretrain.corpus.tokenizers import load_tokenizer

    checkpoint.save(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "lm")
    for place in (tmp_path / "lm", places["masked"]):
        with pytest.raises(PretrainError, match=r"which predicts no labels or answers.*pretrain generate"):
            pretrain.predict(place, ["a"])


def test_rows_keep_their_order_and_columns_whatever_the_batches(places, words, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 7)
    rows = [{"id": n, "text": "word " * (n * 7 % 23), "more": [n, {"a": None}]} for n in range(40)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    predict(places["single"], path, "--output", tmp_path / "out.jsonl", "--batch-size", 3)
    out = lines((tmp_path / "out.jsonl").read_text())
    assert [{name: row[name] for name in ("id", "text", "more")} for row in out] == rows
    assert [row["id"] for row in out if row["label"] is None] == [0, 23]  # of nothing nothing is said
    for row in (row for row in out if row["text"]):
        p_C = alone(places["single"], words, row["text"]).softmax(-1)
        assert row["label"] == ["no", "yes", "maybe"][int(p_C.argmax())]
        assert row["score"] == pytest.approx(float(p_C.max()), abs=1e-5)


def test_a_large_file_is_read_a_little_at_a_time(places, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 10)
    taken = []

    def many():
        for number in range(1000):
            taken.append(number)
            yield f"row {number}", {"text": "a b"}

    stream = predictions(open_head(places["single"]), many())
    assert [next(stream)[0][0] for _ in range(25)][-1] == "row 24" and len(taken) == 30


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "parquet", "stdin lines", "stdin jsonl"])
def test_each_kind_of_input_is_read_and_csv_is_written(places, tmp_path, kind):
    texts = ["some words", 'with "quotes", a comma', "Größe"]
    place, more = tmp_path / f"in.{kind}", {}
    if kind in ("csv", "tsv"):
        with place.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows([("n", "text"), *enumerate(texts)])
    elif kind == "txt":
        place.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place)
    else:
        given = [json.dumps({"text": text}) for text in texts] if "jsonl" in kind else texts
        place, more = "-", {"input": "\n".join(given)}
    predict(places["single"], place, "--output", tmp_path / "out.csv", **more)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        out = list(csv.DictReader(file))
    assert [row["text"] for row in out] == texts
    assert [row["label"] for row in out] == [row["label"] for row in pretrain.predict(places["single"], texts)]


def test_empty_lines_of_a_text_keep_their_place(places, tmp_path):
    (tmp_path / "in.txt").write_text("one\n\nthree\n")
    rows = lines(predict(places["single"], tmp_path / "in.txt"))
    assert [row["text"] for row in rows] == ["one", "", "three"]
    assert [row["label"] is None for row in rows] == [False, True, False] and rows[1]["score"] is None


def test_rows_that_cannot_be_read_are_left_out_where_that_is_asked_for(places, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\nnothing\n{"txt": "b"}\n{"text": 3}\n{"text": "c"}\n')
    rows = lines(predict(places["single"], path, "--on-error", "skip"))
    assert [row["text"] for row in rows] == ["a", "c"]
    with pytest.raises(PretrainError, match=r"in\.jsonl:2: not JSON.*or --on-error skip"):
        predict(places["single"], path)


def test_where_no_row_can_be_read_there_is_an_error_and_no_output(places, tmp_path):
    path, out = write_rows(tmp_path / "in.jsonl", [{"body": "a"}, {"body": "b"}]), tmp_path / "out.jsonl"
    with pytest.raises(
        PretrainError, match=r"no row can be read: .*2.* without text.*; accepted: at least one with 'te"
    ):
        predict(places["single"], path, "--on-error", "skip", "--output", out)
    assert not out.exists()
    with pytest.raises(PretrainError, match=r"no column 'text'.*accepted: --text with one of body$"):
        predict(places["single"], path)  # to skip would be no help
    path = write_rows(tmp_path / "in.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(PretrainError, match=r"row 2\): no column 'text'.*, or --on-error skip$"):
        predict(places["single"], path)


def test_an_output_that_is_there_is_written_over_with_force_alone(places, tmp_path):
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "out.jsonl").write_text("what was there\n")
    with pytest.raises(PretrainError, match="out.jsonl exists; accepted: another file, or --force"):
        predict(places["single"], tmp_path / "in.txt", "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "what was there\n"
    predict(places["single"], tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--force")
    assert lines((tmp_path / "out.jsonl").read_text())[0]["text"] == "one"


def test_a_column_that_is_there_already_is_kept(places, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"text": "a", "label": "true one"}, {"text": "b", "label": "other"}])
    out = lines(predict(places["single"], path))
    assert [row["label"] for row in out] == ["true one", "other"]
    assert {row["predicted_label"] for row in out} <= {"no", "yes", "maybe"} and "score" in out[0]


@pytest.mark.parametrize(
    "content, name, message",
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "in.jsonl", r"in\.jsonl:2 \(row 2\): no column 'text' \(did you mean 'txt'\?\)"),
        ('{"text": "a"}\n\n{"text": 3}\n', "in.jsonl", r"in\.jsonl:3 \(row 2\): column 'text' is int; accepted: text"),
        ('{"text": "a"}\nnothing\n', "in.jsonl", r"in\.jsonl:2: not JSON"),
        ("text,n\na,1\nb\n", "in.csv", r"in\.csv:3 \(row 2\): 1 cells; accepted: 2 cells"),
        ('{"text": "a"}\n{"text": "b", "label": 1}\n', "in.jsonl", r"in\.jsonl:2 \(row 2\): a column 'label' that the first"),
        ("a", "in.zip", r"in\.zip is an archive \(\.zip\); accepted: \.jsonl"),
        ("a", "in.env", "looks like a secret"),
        (None, "none.csv", "no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_with_line_and_row_and_leaves_nothing(places, tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(PretrainError, match=message) as error:
        predict(places["single"], tmp_path / name, "--output", tmp_path / "out.jsonl", "--force")
    assert "\n" not in str(error.value) and (tmp_path / "out.jsonl").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl"} | ({name} if content is not None else set())


def test_an_output_of_another_kind_or_the_input_itself_is_refused(places, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(PretrainError, match=r"accepted: a file that ends with \.jsonl or \.csv"):
        predict(places["single"], path, "--output", tmp_path / "out.xlsx")
    with pytest.raises(PretrainError, match="is the input"):
        predict(places["single"], path, "--output", path)


def test_an_output_that_is_no_file_stays_what_it_is_and_a_link_leads_to_the_file(places, tmp_path):
    (tmp_path / "in.txt").write_text("one\n")
    os.mkfifo(tmp_path / "pipe.jsonl"), (tmp_path / "link.jsonl").symlink_to("other.jsonl")
    for force in ([], ["--force"]):
        with pytest.raises(PretrainError, match=r"^--output .*pipe.jsonl is a named pipe; accepted: another file$"):
            predict(places["single"], tmp_path / "in.txt", "--output", tmp_path / "pipe.jsonl", *force)
    predict(places["single"], tmp_path / "in.txt", "--output", tmp_path / "link.jsonl")
    assert (tmp_path / "pipe.jsonl").is_fifo() and (tmp_path / "link.jsonl").is_symlink()
    assert lines((tmp_path / "other.jsonl").read_text())[0]["text"] == "one"


def test_bytes_are_written_in_base64(places, tmp_path):
    table = pyarrow.table({"text": ["a"], "data": [b"\xff"], "deep": [{"data": [b"\xfe"]}]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    (row,) = lines(predict(places["single"], tmp_path / "in.parquet"))
    assert row["data"] == "/w==" and row["deep"] == {"data": ["/g=="]}
    predict(places["single"], tmp_path / "in.parquet", "--output", tmp_path / "out.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))
    assert row["data"] == "/w==" and json.loads(row["deep"]) == {"data": ["/g=="]}


def test_texts_longer_than_what_is_read_are_counted(places, tmp_path):
    head = open_head(places["single"])
    encoder, known = head.context.encoder, head.context.vocabulary
    assert encoder is not None
    room = head.context.length - sum(token is not None for token in (known.begin, known.eos))
    fits = "b" + " a" * room
    while len(encoder.ids([fits])[0]) > room:
        fits = fits[:-1]
    longer = fits + " a" * 3
    assert len(encoder.ids([fits])[0]) == room < len(encoder.ids([longer])[0]), "exactly as many as are read"
    rows = [{"text": text} for text in ("word " * 2000, fits, longer, "short")]
    path = write_rows(tmp_path / "in.jsonl", rows)
    for ours in (True, False):
        chosen = replace(head, ours=ours, tally=Counter())
        predict_file(chosen, str(path), tmp_path / f"{ours}.jsonl")
        assert chosen.tally["cut"] == 2, "a text that just fits loses nothing"
    shown = CliRunner().invoke(app, ["predict", str(places["single"]), str(path)])
    assert f"warning: 2 texts of more than {head.context.length} tokens are cut: no more is read" in shown.stderr


def test_a_training_tells_how_many_texts_it_cut(prepared, tiny, tmp_path):
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.engine import run
    from pretrain.recipe import check

    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny("bert", vocab_size=len(tokenizer)), tokenizer, tmp_path / "init")
    rows = [{"text": f"{n} " + "word " * (99 if n % 4 == 0 else 3), "label": "ab"[n % 2], "domain": "d", "id": str(n)}
            for n in range(16)]  # fmt: skip
    write_corpus(iter(rows), tmp_path / "corpus", validation=0.0, test=0.0, near_duplicates=None)
    stage = {"stage": "train", "name": "model", "corpus": str(tmp_path / "corpus"), "init": str(tmp_path / "init"),
             "objective": {"method": "classification", "label": "label"}, "length": 64, "batch_rows": 8, "workers": 1,
             "budget": {"steps": 4}, "evaluate_every": 0}  # fmt: skip
    lines: list[str] = []
    run(check({"name": "t", "output": str(tmp_path / "run"), "stages": [stage]}), say=lines.append)
    (told,) = [line for line in lines if "cut (length)" in line]
    assert "warning: 8 of 32 texts read (25.00%) had more than 64 tokens and were cut" in told
    metrics = json.loads((tmp_path / "run" / "model" / "stage.json").read_text())["metrics"]
    assert (metrics["texts_read"], metrics["texts_cut"]) == (32, 8)
    steps = [
        row for row in map(json.loads, (tmp_path / "run" / "model" / "log.jsonl").open()) if row["event"] == "step"
    ]
    assert steps[-1]["cut"] == 8 and "8 of 32 texts" in (tmp_path / "run" / "report.html").read_text()


def tuned(folder, prepared, init, objective, rows):
    """A checkpoint that a recipe's training has made of labelled rows."""
    from pretrain.engine import run
    from pretrain.recipe import check

    write_corpus(iter(rows), folder / "corpus", validation=0.1, test=0.1, near_duplicates=None)
    stage = {"stage": "train", "name": "model", "corpus": str(folder / "corpus"), "init": str(init), "save_every": 0,
             "objective": objective, "length": 64, "batch_rows": 8, "budget": {"steps": 2}}  # fmt: skip
    run(check({"name": "t", "output": str(folder / "run"), "stages": [stage]}))
    return folder / "run"


@pytest.fixture(scope="module")
def answering(prepared, tiny, tmp_path_factory):
    from pretrain.corpus.tokenizers import load_tokenizer

    home = tmp_path_factory.mktemp("answering")
    checkpoint.save(tiny(vocab_size=512, initializer_range=0.4), load_tokenizer(prepared / "tokenizer"), home / "init")
    rows = [{"id": str(n), "domain": "d", "text": f"count {n}", "reply": f"so {n + 1}"} for n in range(40)]
    objective = {"method": "seq2seq", "prompt": "{text}\nreply: ", "target": "reply", "answer": 5}
    return tuned(home, prepared, home / "init", objective, rows)


def test_a_decoder_that_has_learnt_answers_gives_them_by_its_own_prompt(answering, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"question": "count 3"}, {"question": "a longer one, count 11"}])
    out = lines(predict(answering, path, "--text", "question"))
    model, tokenizer = pretrain.load(answering)
    for row in out:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(f"{row['question']}\nreply: ")["input_ids"]]])
        made = model.generate(
            ids, max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        assert row["prediction"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def evaluate(*arguments):
    outcome = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json"])
    if outcome.exception is not None:
        raise outcome.exception
    return json.loads(outcome.stdout[outcome.stdout.index("{") :])["metrics"]


def test_evaluate_says_of_how_many_documents_it_took_how_many_and_takes_all_if_asked(places, tmp_path):
    rows = [{"text": f"word {n}", "label": ("no", "yes", "maybe")[n % 3]} for n in range(24)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    for options, count in ((["--max-documents", "9"], 9), (["--max-documents", "9", "--all"], 24), ([], 24)):
        arguments = ["evaluate", str(places["single"]), "--data", str(path), "--label", "label", *options]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        assert ("9 documents of 24, from all alike (--all takes all): task" in shown.stderr) == (count < 24)
        assert ("\nof 9 of 24 documents\n" in shown.stdout) == (count < 24)
        printed = CliRunner().invoke(app, [*arguments, "--json"]).stdout
        assert json.loads(printed)["taken"] == {"documents": count, "of": 24}


def test_evaluate_measures_a_classifier_on_a_file_as_its_predictions_say(places, tmp_path):
    texts = ["word " * n for n in range(1, 13)]
    predicted = [row["label"] for row in pretrain.predict(places["single"], texts)]
    rows = [
        {"body": t, "truth": p if n % 3 else "maybe"} for n, (t, p) in enumerate(zip(texts, predicted, strict=True))
    ]
    path = write_rows(tmp_path / "in.jsonl", rows)
    right = sum(row["truth"] == p for row, p in zip(rows, predicted, strict=True))
    metrics = evaluate(places["single"], "--data", path, "--text", "body", "--label", "truth")
    assert metrics["accuracy"] == pytest.approx(right / 12) and {"macro_f1", "label_loss"} <= metrics.keys()


def test_what_load_gives_predicts_and_is_measured_by_its_head(places):
    place, texts = places["single"], ["word " * n for n in range(1, 13)]
    opened = pretrain.load(place)
    predicted = pretrain.predict(opened, texts)
    assert predicted == pretrain.predict(place, texts)
    documents = [{"text": text, "label": row["label"]} for text, row in zip(texts, predicted, strict=True)]
    assert pretrain.evaluate(*opened, documents)["metrics"]["accuracy"] == 1.0
    with pytest.raises(
        PretrainError, match=r"no document has a 'label' \(did you mean 'lable'\?\), .*beside text, lable"
    ):
        pretrain.evaluate(*opened, [{"text": "a", "lable": "yes"}])
    with pytest.raises(PretrainError, match="checkpoint BertForSequenceClassification: accepted: a path, or"):
        pretrain.predict(opened[0], texts)
    with pytest.raises(PretrainError, match="several labels a text is measured on a file: pretrain evaluate"):
        pretrain.evaluate(*pretrain.load(places["several"]), documents)


@pytest.mark.filterwarnings("error")
def test_texts_that_are_missing_get_nulls_in_any_form(places):
    head = places["single"]
    nothing = {"label": None, "score": None}
    for missing in (None, float("nan"), {"text": None}, {"text": float("nan")}, "", " \n", pandas.NA):
        rows = pretrain.predict(head, [missing, "a"])
        assert rows[0] == nothing and rows[1] == pretrain.predict(head, ["a"])[0], missing
    with pytest.raises(PretrainError, match="text 1: '3' is int; accepted: a text, a document with one, or None"):
        pretrain.predict(head, ["a", 3])


def test_evaluate_takes_what_predict_takes(places):
    place = places["single"]
    documents = [{"text": text, "label": "yes"} for text in TEXTS]
    usual = pretrain.evaluate(*pretrain.load(place), documents)
    task = [{"method": "task", "objective": "classification"}]
    for given in ((place, documents), (str(place), documents, task), (pretrain.load(place), documents)):
        assert pretrain.evaluate(*given)["metrics"] == usual["metrics"]
    assert pretrain.evaluate(place, texts=documents, evaluations=task)["metrics"] == usual["metrics"]
    for wrong, message in (((place,), "no texts; accepted:"), ((3, documents), "model int: accepted: a model, a path")):
        with pytest.raises(PretrainError, match=message):
            pretrain.evaluate(*wrong)


def test_documents_without_a_text_or_a_label_are_left_out_with_a_warning_as_those_of_a_file_are(places, tmp_path):
    place = places["single"]
    rows = [{"text": text, "label": "yes"} for text in TEXTS]
    rows += [{"text": " ", "label": "no"}, {"text": None, "label": "no"}, {"text": "a", "label": None}]
    with pytest.warns(PretrainWarning, match=r"left out: 3 of 8 documents, without 'text' or 'label'"):
        metrics = pretrain.evaluate(place, rows)["metrics"]
    path = write_rows(tmp_path / "in.jsonl", rows)
    assert metrics["documents"] == 5 == evaluate(place, "--data", path, "--on-error", "skip")["documents"]
    with pytest.raises(PretrainError, match="no document has 'text' and 'label'; accepted: at least one"):
        pretrain.evaluate(place, rows[-3:])


def test_a_column_or_a_label_that_is_not_there_is_told_with_those_that_are(places, tmp_path):
    file = tmp_path / "in.csv"
    file.write_text("body,truth\nsome words,Yes \n")
    with pytest.raises(PretrainError, match=r"--label 'truht': .*did you mean 'truth'\?\); .*one of truth, body$"):
        evaluate(places["single"], "--data", file, "--text", "body", "--label", "truht")
    with pytest.raises(PretrainError, match=r"truth 'Yes ' \(did you mean 'yes'\?\)"):
        evaluate(places["single"], "--data", file, "--text", "body", "--label", "truth")


def test_evaluate_fits_the_head_taggers_regressors_answers_and_language_models(places, answering, prepared, tmp_path):
    tags = write_rows(
        tmp_path / "t.jsonl", [{"text": "Ann in Rome", "ner": ["O", "O", "B-LOC"]}, {"text": "a b", "ner": ["O", "O"]}]
    )
    assert "f1" in evaluate(places["tags"], "--data", tags, "--label", "ner")
    numbers = tmp_path / "n.csv"
    numbers.write_text("text,stars\na b,1\nc d e,2\nf,4\n")
    assert evaluate(places["number"], "--data", numbers, "--label", "stars")["mse"] > 0
    answers = write_rows(tmp_path / "a.jsonl", [{"text": "count 3", "reply": "so 4"}])
    assert "exact_match" in evaluate(answering, "--data", answers)  # the column is the one that it was trained with
    bodies = write_rows(tmp_path / "b.jsonl", [{"body": "def main():\n    return 1\n" * 4}])
    place = newest_checkpoint(answering).parents[2] / "init"
    assert evaluate(place, "--data", bodies, "--text", "body")["bits_per_byte"] > 0
    with pytest.raises(PretrainError, match=r"label 'x': a LlamaForCausalLM predicts none"):
        evaluate(place, "--data", bodies, "--text", "body", "--label", "x")


def test_evaluate_passes_over_what_the_run_passed_over_and_counts_it(prepared, tiny, tmp_path):
    """Of the file that a classifier was trained with no row is refused; of a stranger's the first is, with the others."""
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.engine import run
    from pretrain.recipe import check

    checkpoint.save(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "init")
    rows = [{"text": f"words of number {n}", "label": "ab"[n % 2]} for n in range(60)]
    rows += [{"text": f"more words {n}", "label": None} for n in range(5)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    (tmp_path / "more.jsonl").write_text(data.read_text() + '{"text": 3}\n' * 2, encoding="utf-8")
    source = {"files": str(data), "required": ["label"]}
    stages = [
        {"stage": "data", "name": "corpus", "sources": [source], "validation": 0.1, "test": 0.1, "near_duplicates": None},
        {"stage": "train", "name": "model", "corpus": "corpus", "init": str(tmp_path / "init"), "save_every": 0,
         "objective": "classification", "length": 32, "budget": {"steps": 1}},
    ]  # fmt: skip
    run(check({"name": "t", "output": str(tmp_path / "run"), "stages": stages}), say=lambda text: None)
    with data.open("a", encoding="utf-8") as file:  # since then it has grown by labels that were never learnt
        file.write("".join(json.dumps({"text": f"others {n}", "label": "c"}) + "\n" for n in range(4)))

    def measure(*arguments):
        return CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), *map(str, arguments)])

    outcome = measure("--data", data, "--json")
    assert json.loads(outcome.stdout)["metrics"]["documents"] == 60
    assert "passed over: 5 of 69 rows, without a 'label' (" in outcome.stderr
    first = "data.jsonl:61 (row 61), "
    assert first in outcome.stderr and "…)" in outcome.stderr, "the first few are named"
    assert "passed over: 4 rows with another 'label'" in outcome.stderr
    stranger = tmp_path / "other.jsonl"
    stranger.write_text(data.read_text(), encoding="utf-8")
    refused = str(measure("--data", stranger).exception)
    assert "label 'c'" in refused and "--on-error skip (4 rows are such: " in refused
    assert measure("--data", stranger, "--on-error", "skip", "--json").exit_code == 0


def test_an_output_in_a_folder_that_is_not_there_is_refused_and_makes_none(places, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(PretrainError, match=r"there is no folder .*new/folder; accepted: a file in one that is there"):
        predict(places["single"], path, "--output", tmp_path / "new" / "folder" / "x.jsonl")
    assert not (tmp_path / "new").exists()


def test_sets_of_labels_are_measured_against_sets(places, tmp_path):
    rows = [row["labels"] for row in pretrain.predict(places["several"], TEXTS)]
    cells = [json.dumps(labels) if len(labels) != 1 else labels[0] for labels in rows]
    table = tmp_path / "s.csv"
    table.write_text(
        "".join(f'"{text}","{cell.replace(chr(34), chr(34) * 2)}"\n' for text, cell in zip(TEXTS, cells, strict=True))
    )
    given = ("--data", table, "--no-header", "--text", "0", "--label", "1")
    right = evaluate(places["several"], *given)
    assert (right["micro_f1"], right["macro_f1"], right["exact_match"]) == (1, 1, 1) and right["documents"] == len(
        TEXTS
    )
    others = write_rows(tmp_path / "s.jsonl", [{"text": t, "labels": "no; yes"} for t in TEXTS])
    found = evaluate(places["several"], "--data", others)
    both = [len({"no", "yes"} & set(labels)) for labels in rows]
    assert found["micro_f1"] == pytest.approx(2 * sum(both) / (sum(map(len, rows)) + 2 * len(TEXTS)))
    assert found["exact_match"] == sum(set(labels) == {"no", "yes"} for labels in rows) / len(TEXTS)
    wrong = write_rows(tmp_path / "w.jsonl", [{"text": "a", "labels": ["no", "yess"]}])
    with pytest.raises(
        PretrainError, match=r"w.jsonl:1 .*labels 'yess' \(did you mean 'yes'\?\); accepted: .*no, yes, maybe"
    ):
        evaluate(places["several"], "--data", wrong)


def test_a_csv_without_a_header_is_read_by_numbers(places, tmp_path):
    table = tmp_path / "h.csv"
    table.write_text("one,no\ntwo,yes\n")
    rows = lines(predict(places["single"], table, "--no-header", "--text", "0"))
    assert [row["0"] for row in rows] == ["one", "two"]
    assert evaluate(places["single"], "--data", table, "--no-header", "--text", "0", "--label", "1")["documents"] == 2
    assert len(lines(predict(places["single"], table, "--text", "one"))) == 1
    table.write_text("it was a very long day,no\nthe night was longer than that,yes\n")
    for command in (predict, lambda *given: evaluate(given[0], "--data", *given[1:])):
        with pytest.raises(
            PretrainError, match=r"no column 'text', and the first row looks like no header \(--no-header\)"
        ):
            command(places["single"], table)


def test_a_prompts_own_columns_are_read_and_one_that_is_missing_is_told(answering, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"txt": "count 3"}])
    with pytest.raises(
        PretrainError, match=r"in\.jsonl:1 \(row 1\): no column 'text' .*accepted: --text with one of txt"
    ):
        predict(answering, path)


def test_a_missing_column_or_head_is_told_before_a_model_is_read(places, answering, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)  # no model can be read
    plain = write_rows(tmp_path / "in.jsonl", [{"txt": "count 3", "truth": "yes"}])
    with pytest.raises(PretrainError, match=r"\(row 1\): no column 'text' .*accepted: --text with one of txt, truth"):
        predict(places["single"], plain)
    with pytest.raises(PretrainError, match=r"\(row 1\): no column 'second'.*accepted: --pair with one of txt, truth"):
        predict(places["single"], plain, "--text", "txt", "--pair", "second")
    with pytest.raises(PretrainError, match=r"^text 0: no column 'second'.*accepted: pair with one of text$"):
        pretrain.predict(places["single"], ["a"], pair="second")
    with pytest.raises(PretrainError, match=r"BertForMaskedLM, which predicts no labels or answers"):
        predict(places["masked"], plain, "--text", "txt")
    with pytest.raises(PretrainError, match=r"--label 'labl': .* no such column; accepted: --label with one of t"):
        evaluate(places["single"], "--data", plain, "--text", "txt", "--label", "labl")
    with pytest.raises(PretrainError, match=r"--pair 'second': .* no such column"):
        evaluate(places["single"], "--data", plain, "--text", "txt", "--label", "truth", "--pair", "second")
    with pytest.raises(PretrainError, match=r"--label 'reply': .* no such column"):  # as it was trained
        evaluate(answering, "--data", plain, "--text", "txt")


def test_a_second_text_is_refused_of_a_model_that_was_trained_on_single_ones(answering):
    with pytest.raises(PretrainError, match="--pair other: .* was trained on single texts; accepted: no --pair"):
        pretrain.predict(answering, [{"text": "a", "other": "b"}], pair="other")


def test_a_masked_model_is_told_what_to_ask_for(places, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"text": "a b c"}])
    with pytest.raises(PretrainError, match=r"BertForMaskedLM: no evaluation is chosen .*accepted: --evaluation"):
        evaluate(places["masked"], "--data", path)
    with pytest.raises(PretrainError, match=r'accepted: evaluations=\["masked_loss"\], or \[\{"method": "probe"'):
        pretrain.evaluate(*pretrain.load(places["masked"]), ["a b c"])
    assert pretrain.evaluate(*pretrain.load(places["masked"]), ["a b c " * 9], ["masked_loss"])["metrics"]
    with pytest.raises(PretrainError, match='does not predict the next token: accepted: objective="masked_lm"'):
        pretrain.train(*pretrain.load(places["masked"]), ["a b c"] * 4, budget={"steps": 1})


def test_without_an_output_rows_go_to_the_screen_as_json(places):
    out = io.StringIO(predict(places["single"], "-", input="one\ntwo\n"))
    assert [set(json.loads(line)) for line in out] == [{"text", "label", "score"}] * 2
