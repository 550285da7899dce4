"""The command line: quick where nothing heavy is needed, one clear line for each mistake."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import termios

import pytest
import torch
from processor import libraries, python
from typer.testing import CliRunner

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError


def cli(*arguments, cwd="."):
    """What a command gives, in this process: its exit status, and the lines of its output and of its errors."""
    from pretrain.cli import app

    words, out, err, status = [*map(str, arguments)], io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd),
    ):
        patch.setattr(sys, "argv", ["pretrain", *words])
        try:
            app(words)
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def model_folder(prepared, tiny, tmp_path_factory):
    from pretrain.corpus.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("model") / "c"
    checkpoint.save(tiny(vocab_size=512, max_position_embeddings=128), load_tokenizer(prepared / "tokenizer"), folder)
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "--json"], ["--version"]])
def test_light_commands_answer_without_torch_and_at_once(arguments):
    probe = "import sys, atexit; atexit.register(lambda: print('HEAVY' if 'torch' in sys.modules else 'LIGHT', file=sys.stderr)); "
    probe += f"sys.argv = ['pretrain', *{arguments!r}]; from pretrain.cli import app; app()"
    for attempt in range(4):  # each beside the libraries as long as they take at that moment
        done, seconds = python(probe)
        assert done.returncode == 0 and "LIGHT" in done.stderr, done
        if seconds < 3 * libraries(attempt):  # 0.6 to 1.5 times
            return
    pytest.fail(f"{arguments} takes {seconds:.2f} s of a processor")


def test_methods_are_listed_searched_and_shown():
    rows = json.loads(cli("methods", "--json").stdout)
    assert {"name", "kind", "title", "arxiv", "families"} == rows[0].keys()
    assert {"causal_lm", "adamw", "cosine", "held_out", "deduplicate"} <= {r["name"] for r in rows}
    assert "adamw" in cli("methods", "decoupled").stdout and "cosine" not in cli("methods", "decoupled").stdout
    shown = cli("methods", "show", "adamw").stdout
    assert "Decoupled Weight Decay Regularization (arXiv:1711.05101)" in shown and "beta2" in shown
    wrong = cli("methods", "show", "adamv")
    assert wrong.returncode == 1 and "did you mean 'adamw'" in wrong.stderr


def test_a_starter_recipe_is_written_once_and_is_good(tmp_path):
    assert cli("new", "mine", "--starter", cwd=tmp_path).returncode == 0
    (tmp_path / "a.py").write_text("x = 1\n")
    planned = cli("run", "mine.yaml", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0 and "train" in planned.stdout and "about" in planned.stdout
    again = cli("new", "mine", "--starter", cwd=tmp_path)
    assert again.returncode == 1 and "mine.yaml exists" in again.stderr


def test_a_mistake_is_one_line_and_status_1(tmp_path):
    (tmp_path / "r.yaml").write_text("stages: []\n")
    for arguments in (["run", "r.yaml"], ["run", "none.yaml"], ["generate", "nothing"], ["report", "."]):
        done = cli(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_prompt_is_a_message_in_the_chat_template_only_when_asked(prepared, tiny, tmp_path):
    from pretrain.cli import app
    from pretrain.core.encoding import chat_tokens
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.stages.decode import continue_prompt

    def generate(name, *options):
        given = [
            "generate",
            str(tmp_path / name),
            "--prompt",
            "def main",
            "--max-new-tokens",
            "4",
            "--temperature",
            "0",
        ]
        return CliRunner().invoke(app, [*given, *options])

    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    checkpoint.save(model, tokenizer, tmp_path / "plain")
    tokenizer.chat_template = "Q: {{ messages[0].content }} A:"
    checkpoint.save(model, tokenizer, tmp_path / "chat")
    plain, chat = generate("chat"), generate("chat", "--chat")
    assert "plain text; --chat uses the checkpoint's chat template" in plain.stderr and "note" not in chat.stderr
    ids = [token for part in chat_tokens(tokenizer, "def main") for token in part]
    assert tokenizer.decode(ids) == "Q: def main A:"
    with torch.no_grad():
        answer = model.eval().generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert chat.stdout == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert (
        plain.stdout
        == "def main"
        + continue_prompt(model, tokenizer, "def main", max_new_tokens=4, temperature=0)["continuation"]
        + "\n"
    )
    assert "has no chat template; accepted: a prompt without --chat" in str(generate("plain", "--chat").exception)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PretrainError, match="the chat template cannot be filled in"):
        chat_tokens(tokenizer, "x")


def test_a_text_that_ends_at_once_is_said_to(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    end = json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"forced_eos_token_id": end}))
    (tmp_path / "model" / "checksums.json").unlink()
    done = cli("generate", tmp_path / "model", "--prompt", "def main", "--max-new-tokens", "1", "--no-token-healing")
    assert done.returncode == 0 and done.stdout == "def main\n"
    assert done.stderr.endswith("note: the model has ended the text at once; another --seed or prompt may go on\n")


def test_generate_continues_a_prompt(model_folder):
    done = cli("generate", model_folder, "--prompt", "def main", "--max-new-tokens", "5", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.startswith("def main") and len(done.stdout) > 9
    assert cli("generate", model_folder, "--prompt", "def main", "--max-new-tokens", "5", "--seed", "3").stdout == (
        cli("generate", model_folder, "--prompt", "def main", "--max-new-tokens", "5", "--seed", "3").stdout
    )
    wrong = cli("generate", model_folder, "--method", "none")
    assert wrong.returncode == 1 and "unknown decoding 'none'" in wrong.stderr
    fields = f"{{method: proxy_tuning, expert: {model_folder}, anti_expert: {model_folder}}}"
    proxied = cli(
        "generate",
        model_folder,
        "--prompt",
        "def main",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--method",
        fields,
    )
    assert proxied.stdout == done.stdout  # an expert that is its own anti-expert changes nothing


def test_evaluate_prints_a_table_or_json(model_folder, prepared, tmp_path):
    found = json.loads(cli("evaluate", model_folder, "--data", prepared / "corpus", "--json").stdout)
    assert (
        found["intervals"]["bits_per_byte"][0]
        < found["metrics"]["bits_per_byte"]
        < found["intervals"]["bits_per_byte"][1]
    )
    (tmp_path / "a.txt").write_text("some text to measure\n" * 20)
    assert "xz -9e" in cli("evaluate", model_folder, "--data", tmp_path / "a.txt").stdout


def test_folders_of_a_folder_are_measured_each_unless_columns_endings_or_loose_files_tell_otherwise(
    model_folder, tmp_path
):
    for name, text in (
        ("de/a.txt", "Der Hund. " * 30),
        ("fr/b.txt", "Le chien. " * 30),
        ("fr/c.txt", "Un chat. " * 30),
    ):
        (tmp_path / "held" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "held" / name).write_text(text)

    def domains() -> set[str]:
        return set(json.loads(cli("evaluate", model_folder, tmp_path / "held", "--json").stdout)["domains"])

    assert domains() == {"de", "fr"}
    (tmp_path / "held" / "d.txt").write_text("No folder. " * 30)
    assert domains() == {"txt"}
    (tmp_path / "held" / "d.txt").rename(tmp_path / "held" / "fr" / "d.md")
    assert domains() == {"txt", "md"}


def test_evaluate_writes_the_record_to_a_file_and_not_over_another(model_folder, prepared, tmp_path):
    asked = ("evaluate", model_folder, "--data", prepared / "corpus", "--json", "--output", tmp_path / "measured.json")
    done = cli(*asked)
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert kept.pop("seal") and kept == json.loads(done.stdout)
    assert "wrote" in done.stderr
    for options, message in (
        (asked, "exists; accepted: another file, or --force"),
        ((*asked[:-1], tmp_path / "a.txt"), "accepted: a file that ends with .json"),
        ((*asked[:-1], tmp_path / "none" / "a.json"), "there is no folder"),
    ):
        refused = cli(*options)
        assert message in refused.stderr and "document" not in refused.stderr  # before anything is measured


def test_of_many_documents_the_same_are_evaluated_as_in_a_stage(model_folder, prepared, monkeypatch):
    from typer.testing import CliRunner

    import pretrain.stages.evaluate as stage
    from pretrain.cli import app
    from pretrain.corpus.store import Corpus
    from pretrain.evaluation.likelihood.held_out import HeldOut

    seen = []
    result = {"metrics": {}, "intervals": {}, "compressors": {}, "domains": {}}
    monkeypatch.setattr(
        stage, "evaluate", lambda model, tokenizer, documents, *_, **__: seen.append(documents) or result
    )
    CliRunner().invoke(app, ["evaluate", str(model_folder), "--data", str(prepared / "corpus"), "--split", "train",
                             "--max-documents", "7", "--json"], catch_exceptions=False)  # fmt: skip
    processor = stage.load_both(model_folder)[1]
    theirs = stage.documents_of(Corpus(prepared / "corpus"), "train", 7, [HeldOut()], processor)
    assert [d["id"] for d in seen[0]] == [d["id"] for d in theirs] and len(theirs) == 7


def test_defaults_made_by_a_function_are_shown_as_values():
    from dataclasses import dataclass, field, fields

    from pretrain.core.method import default_of

    @dataclass
    class Example:
        needed: int
        given: float = 1.5
        made: dict = field(default_factory=lambda: {"a": 1})

    assert [default_of(item) for item in fields(Example)] == ["required", "1.5", "{'a': 1}"]


def test_a_store_is_given_on_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text("stages:\n  - {stage: data, sources: [a.txt], validation: 0, test: 0}\n")
    (tmp_path / "a.txt").write_text("text\n")
    for output in ("one", "two"):
        done = cli("run", "r.yaml", "--output", output, "--store", "kept", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "already done" in done.stderr and (tmp_path / "two" / "data" / "corpus").is_dir()
    assert "finished" in cli("run", "r.yaml", "--output", "three", "--store", "kept", "--dry-run", cwd=tmp_path).stdout


def test_shell_completion_offers_method_names():

    environment = os.environ | {
        "_PRETRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": "pretrain methods cos",
        "COMP_CWORD": "2",
    }
    executable = os.path.join(os.path.dirname(sys.executable), "pretrain")
    done = subprocess.run([executable], capture_output=True, text=True, check=False, env=environment)
    assert "cosine" in done.stdout


def test_an_interrupt_says_how_to_go_on():
    program = "import pretrain.cli as c, pretrain.recipe as r\n"
    program += "def stop(*a, **k): raise KeyboardInterrupt\nr.load = stop\nimport sys; sys.argv = ['pretrain', 'run', 'x.yaml']\nc.app()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "run the same again to go on" in done.stderr


STOPS = """
import os, signal, sys, time, pretrain.cli as c, pretrain.recipe as r
def stop(*a, **k):
    %s
    raise KeyboardInterrupt
r.load = stop
sys.argv = ['pretrain', 'run', 'x.yaml']
if 'IGNORED' not in os.environ:  # as it is where the tests run under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
c.app()
"""


def stopped(body, **given):
    command = [sys.executable, "-c", STOPS % body]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50, **given)


@pytest.mark.promise(
    "Faults",
    "A command that is terminated or interrupted, or whose terminal is closed, says that what is done is kept and removes "
    "what it was writing; under `nohup` it runs on.",
)
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "terminated: the terminal was closed")],
)
def test_a_termination_outside_training_says_that_what_is_done_is_kept(number, status, words):
    done = stopped(f"os.kill(os.getpid(), signal.{number}); time.sleep(60)")
    assert done.returncode == status and f"{words}; what is done is kept" in done.stderr


@pytest.mark.parametrize(
    ("number", "status", "words"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)
def test_a_signal_while_a_method_is_imported_is_no_mistake_of_the_method(tmp_path, number, status, words):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nfrom dataclasses import dataclass\nfrom pretrain.surgery import Surgery\n"
        f"os.kill(os.getpid(), signal.{number}); time.sleep(60)\n"
        '@dataclass(frozen=True)\nclass Slow(Surgery):\n    """A Title (arXiv:2401.00001)."""\n'
    )
    done = stopped(
        "from pretrain.core import method, registry\n"
        f"    registry.use_methods({str(tmp_path)!r}); method.method_class('slow')"
    )
    assert done.returncode == status and done.stderr.startswith(f"{words}; what is done is kept"), done.stderr


@pytest.mark.parametrize(
    ("number", "status", "words"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)
def test_a_signal_of_which_a_library_makes_an_error_is_still_a_signal(number, status, words):
    done = stopped(
        f"try: os.kill(os.getpid(), signal.{number}); time.sleep(60)\n"
        "    except BaseException: raise RuntimeError('the library cannot go on')"
    )
    assert done.returncode == status and done.stderr.startswith(f"{words}; what is done is kept"), done.stderr


def test_an_interrupt_while_the_command_line_is_imported_is_one_line():
    program = "import sys\nclass Stop:\n    def find_spec(name, *_):\n        if name == 'pretrain.cli': raise KeyboardInterrupt\n"
    program += "sys.meta_path.insert(0, Stop)\nfrom pretrain.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_what_is_removed_after_a_signal_is_removed_whole_when_it_comes_twice(tmp_path):
    body = "from pathlib import Path; from pretrain.core import files\n"
    body += f"    with files.atomic_folder(Path({str(tmp_path / 'made')!r})) as work:\n"
    body += "        plain = files.shutil.rmtree\n"
    body += "        def rmtree(*a, **k): os.kill(os.getpid(), signal.SIGHUP); plain(*a, **k)\n"
    body += "        files.shutil.rmtree = rmtree; (work / 'a').touch(); os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)"
    assert stopped(body).returncode == 129 and list(tmp_path.iterdir()) == []


def test_under_nohup_a_closed_terminal_changes_nothing():
    done = stopped(
        "os.kill(os.getpid(), signal.SIGHUP)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        env=os.environ | {"IGNORED": "1"},
    )
    assert done.returncode == 130 and "interrupted" in done.stderr


def test_a_terminal_that_is_closed_ends_a_command_that_writes_to_it_as_a_signal_does(tmp_path):
    body = "\n    try:\n        [(print('x' * 99, file=sys.stderr), print('y'), time.sleep(0.001)) for _ in range(60000)]\n"
    body += f"    except BaseException as error: open({str(tmp_path / 'end')!r}, 'w').write(repr(error)); raise"
    ours, theirs = os.openpty()

    def in_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", STOPS % body], stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=in_terminal
    )
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    assert process.wait(timeout=50) == 129 and (tmp_path / "end").read_text() == "Terminated(129)"


FULL = "error: standard output cannot be written: No space left on device; accepted: a place with room for it"


@pytest.mark.processes
@pytest.mark.promise(
    "What others have written",
    "Where standard output cannot be written, a full disk most often, the work goes on, and the command says so in one line at its end and fails.",
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is full")
def test_output_on_a_full_disk_is_one_line_at_the_end_and_what_is_done_is_recorded(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words\n" * 50)
    (tmp_path / "r.yaml").write_text(
        "output: run\nstages:\n- {stage: data, name: corpus, sources: [{files: text}], near_duplicates: null}\n"
    )
    with open("/dev/full", "w") as full:
        for arguments in (["methods"], ["run", "r.yaml"]):
            command = [sys.executable, "-m", "pretrain", *arguments]
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False, timeout=100
            )
            assert done.returncode == 1 and done.stderr.splitlines()[-1] == FULL and "Traceback" not in done.stderr
    assert cli("runs", "show", "run", cwd=tmp_path).stdout.count("finished") >= 1
    assert list((tmp_path / "run").rglob("report.html"))


def test_a_reader_who_wants_no_more_is_no_full_disk():
    command = f"{sys.executable} -m pretrain methods | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=50)
    assert done.stdout.count("\n") == 1 and "error" not in done.stderr


def test_a_command_that_keeps_nothing_does_not_say_that_it_did():
    program = "import pretrain.cli as c, pretrain.core.folders as f\n"
    program += "def stop(*a, **k): raise KeyboardInterrupt\nc.newest_checkpoint = f.newest_checkpoint = stop\n"
    program += "import sys; sys.argv = ['pretrain', 'generate', 'x', '--prompt', 'run']\nc.app()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 130 and done.stderr.strip() == "interrupted"


def test_a_warning_of_ours_is_one_line():
    program = "import pretrain.cli as c, pretrain.recipe as r; from pretrain.core.errors import warn\n"
    program += "r.load = lambda *a, **k: warn('rows are planned anew')\n"
    program += "import sys; sys.argv = ['pretrain', 'run', 'x.yaml']\ntry:\n    c.app()\nexcept Exception: pass"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "warning: rows are planned anew\n" in done.stderr and "UserWarning" not in done.stderr


def test_an_encoder_cannot_be_asked_to_generate(tiny, prepared, tmp_path):
    from pretrain.corpus.tokenizers import load_tokenizer

    checkpoint.save(tiny("bert", vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "c")
    done = cli("generate", tmp_path / "c", "--prompt", "x")
    assert done.returncode == 1 and "BertForMaskedLM predicts no next token" in done.stderr


def test_a_misspelt_method_gets_a_guess_and_few_names(capsys):
    from pretrain.cli import app

    guesses = {("methods", "show", "loar"): " (did you mean 'lora'?)", ("methods", "loar"): "; nearest: lora, clear"}
    for command, guess in guesses.items():
        with pytest.raises(SystemExit):
            app([*command])
        text = capsys.readouterr().err
        assert f"'loar'{guess}" in text and len(text) < 300
