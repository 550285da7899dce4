"""Templates of others are filled in within bounds, and as transformers fills them in."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from pretrain.core.encoding import chat_tokens, frame
from pretrain.core.errors import PretrainError
from pretrain.core.system import templates
from pretrain.corpus.tokenizers import train_tokenizer

CHATML = (
    "{%- for message in messages %}{%- if loop.first and message.role != 'system' %}{{ bos_token }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message.content | trim }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHERS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "{% macro say(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}{{ eos_token }}",
)
ENDLESS = {
    "a power of powers": "{{ 9**(9**(9**9)) }}",
    "text without end": "{{ lipsum(n=10**8) }}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a product": "{{ 'x' * 10**11 }}",
    "a width": "{{ '%999999999999d' % 1 }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "a filter": "{{ 'x' | center(10**11) }}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000,
    "much that is written": "{{ 'x' * 10**8 }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text"] * 3, algorithm="bytes")


@pytest.mark.promise(
    "What others have written",
    "A chat template, and a template of lm-eval's tasks when it is first filled in, gets a second of the processor, 512 MiB and 4 MiB of text.",
)
@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_end_is_refused_at_once(tokenizer, what):
    tokenizer.chat_template = ENDLESS[what]
    start = time.process_time() + sum(os.times()[2:4])
    for _ in range(3):  # a template that was beyond a bound is not tried again
        frame(tokenizer)
        with pytest.raises(PretrainError, match=r"^the chat template cannot be filled in \(.*\); accepted: another"):
            chat_tokens(tokenizer, "hello")
    assert time.process_time() + sum(os.times()[2:4]) - start < 5


@pytest.mark.parametrize("template", [CHATML, *OTHERS])
@pytest.mark.parametrize("answering", [False, True])
def test_it_is_what_transformers_makes_of_it(tokenizer, template, answering):
    tokenizer.chat_template = template
    turns = [{"role": role, "content": f" é {role} "} for role in ("system", "user", "assistant")]
    ours = templates.filled(tokenizer, turns, answering=answering)
    assert ours == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)


def test_what_a_template_says_is_wrong_is_told_and_it_is_tried_with_other_messages(tokenizer):
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one alone') }}{% endif %}x"
    turns = [{"role": "user", "content": "a"}] * 2
    with pytest.raises(PretrainError, match=r"cannot be filled in \(.*one alone\)"):
        templates.filled(tokenizer, turns, answering=True)
    assert templates.filled(tokenizer, turns[:1], answering=True) == "x"


def test_a_copy_changes_nothing_here_and_leaves_no_process(tokenizer):
    mark, before = [], psutil.Process().children()
    assert templates.bounded(lambda: mark.append(1) or "text", "a template") == "text"
    assert mark == []
    assert psutil.Process().children() == before
    with pytest.raises(PretrainError, match=r"^a template cannot be filled in \(it ends the process\)"):
        templates.bounded(lambda: os._exit(3), "a template")


def test_what_a_copy_could_not_write_to_its_end_is_not_taken_for_all_of_it(monkeypatch):
    """As where its second of the processor ends while it writes."""

    def write(into, data):
        os.write(into, (len(data) + 1).to_bytes(templates.LENGTH, "big") + data)

    monkeypatch.setattr(templates, "_write", write)
    with pytest.raises(PretrainError, match=r"^a template cannot be filled in \(it ends the process\)"):
        templates.bounded(lambda: "text", "a template")


def test_a_system_without_copies_of_processes_fills_in_here(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert templates.bounded(lambda: "text", "a template") == "text"
    with pytest.raises(PretrainError, match=r"^a template cannot be filled in \(.*by zero.*\)"):
        templates.bounded(lambda: str(1 / 0), "a template")


def test_templates_of_tasks_are_bounded_too():
    pytest.importorskip("lm_eval")
    from lm_eval import utils

    from pretrain.evaluation.tasks._harness import undisturbed

    with undisturbed():
        assert utils.apply_template("{{ a }}{{ b | regex_replace('x', 'y') }}", {"a": 1, "b": "x"}) == "1y"
        for endless in ("{{ 9**(9**(9**9)) }}", "{{ 'x' * 10**11 }}", "{{ 'x' | center(100000000000) }}"):  # constants
            with pytest.raises(PretrainError, match="^a template of the task cannot be filled in"):
                utils.apply_template(endless, {})
