"""The stages that recipes are put together of, as they are written; `$name` stands for what is filled in."""

from __future__ import annotations

import re
from string import Template

COLUMN = 32  # where comments begin, if they can
COMMENT = re.compile(r"(?P<line> *[^ #].*?)  # (?P<why>.*)")

CORPUS = """
$why
  - name: $name
    stage: data
    sources:
$sources
$operations
$held
"""
COPIES = """
    operations:
      - {method: deduplicate, threshold: 0.8}  # copies teach nothing new
"""
HELD = """
    validation: $validation  # held out, measured while it trains
    test: $test  # held out, measured at the end
"""
HELD_AS = """
    # as the run of $run held out: what that has learnt from is not measured, what it held out is not learnt
    validation: $validation
    test: $test
"""
NOT_HELD = """
    # too few documents to hold any out, so nothing is measured: more of them would do, or smaller ones
    validation: 0
    test: 0
"""
TOKENIZER = """
  - name: tokenizer
    stage: tokenizer
    corpus: corpus
    vocab_size: auto  # goes with the size of the model
"""
MODEL = """
  - name: model
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    size: auto  # width, depth, batch and rate for the budget: `pretrain plan`
    model: {family: llama}
    budget: $budget  # $why
$measured
"""
MEASURED = "    evaluate_every: $share  # $times, however long that takes: a larger share is less often"
MEASURED_IN_TIME = "    evaluate_every: $share  # $times, or fewer where it takes long"
FITTED = """
    evaluate_every: $share  # $times
    evaluate_tokens: auto  # held out, each time: all together take a quarter of the training's time at most
"""
MEASURED_ONCE = "    evaluate_every: 0  # at the end alone: a measurement takes longer than the training between two"
EVALUATION = """
  - name: $name
    stage: evaluate
    checkpoint: $checkpoint
    corpus: corpus
$more
"""
KEPT = """
  # What it learnt before: beside the evaluation of that run it shows what is forgotten.
  - name: kept
    stage: evaluate
    checkpoint: $checkpoint
    corpus: $corpus
    compressors: false
"""
SAMPLES = """
  - name: samples
    stage: decode
    checkpoint: $checkpoint
    prompts: $prompts
$more
"""
CONTINUED = """
  - name: model
    stage: train
    corpus: corpus
    init: $init  # its tokenizer comes along
    objective: $objective
    length: $length
    batch_rows: 8
    optimizer: {method: adamw, lr: $rate}  # low: what it knows is to stay
    schedule: {method: rewarm, warmup: 0.01}  # arXiv:2403.08763
    budget: $budget  # $why
$measured
"""
UNLABELLED = (
    "  # All texts, for the encoder: those without a label are worth reading too; the same of them are held out."
)
ENCODER_TOKENIZER = """
  - name: tokenizer
    stage: tokenizer
    corpus: $corpus
    $entries
    cls: true  # [cls] text [sep]: where the classifier reads
    mask: true
"""
ENCODER = """
  # An encoder of your texts first, since labels alone teach little of a language: on 1,500 docstrings of a dozen
  # packages that had 0.68, and 0.64 without; on 1,900 paragraphs of manual pages 0.61 both, in a single run each, so
  # that 0.03 more or less is chance. Where counts of words or characters do better, which take seconds, the report
  # says so; what helps then is a pretrained checkpoint (pretrain new … --init NAME writes the recipe that begins with
  # it) or more labelled rows.
  - name: encoder
    stage: train
    corpus: $corpus
    tokenizer: tokenizer
    model:
      family: $family
      hidden_size: $width
      intermediate_size: $inner
      num_hidden_layers: $blocks
      num_attention_heads: $heads
      max_position_embeddings: $positions
      initializer_range: $range  # 0.7 / sqrt(width)
$pooled
    objective: masked_lm
    length: $length
    batch_rows: 16
    optimizer: {method: adamw, lr: $rate}
    schedule: {method: linear, warmup: 0.1}
    budget: $budget  # $why
$measured
"""
POOLED = """
      classifier_pooling: mean  # of all words' states; cls: that of [cls] alone, which has to be taught to gather them
      classifier_dropout: 0.2
"""
TUNED = """
  - name: $name
    stage: train
    corpus: corpus
    init: $init
$adapter
    objective: $objective  # from the column $label
    length: $length  # $cut
    batch_rows: $rows
    optimizer: {method: adamw, lr: $rate}
    schedule: {method: linear, warmup: 0.1}
    budget: $budget  # $why
$measured
$best
"""
TEMPLATE = "{method: chat_template, template: headings}"
BEST = "    policies: [keep_best]  # of all that is measured the best weights"
# The loss of a classifier rises from overconfidence long before it answers worse.
MOST_RIGHT = (
    "    policies: [{method: keep_best, metric: accuracy, better: higher}]  # of all that is measured what answers best"
)
LORA = "{method: lora, rank: 8, where: all}"
ADAPTER = f"    surgeries: [{LORA}]  # a few weights are trained"
CHAT = """
  # The answers alone are learnt, word by word; what comes before one is its prompt$framed.
  - name: $name
    stage: train
    corpus: corpus
    init: $init
$adapter
    objective: $objective
    length: $length
    batch_rows: $rows
    optimizer: {method: adamw, lr: $rate}
    schedule: {method: cosine, warmup: 0.05}
    budget: $budget  # $why
$measured
    evaluate_tokens: 8_000
"""
MERGED = """
  - name: model  # the LoRA folded in: opens anywhere
    stage: surgery
    checkpoint: tuned
    surgeries: [merge_adapters]
"""
TRIMMED = """
  # The text uses about $kept of the $entries entries of the vocabulary: the others go, with their rows of the
  # embeddings. Text that is unlike yours falls into shorter tokens then.
  - name: trimmed
    stage: surgery
    checkpoint: $init
    surgeries: [trim_vocabulary]  # arXiv:2305.15020
    corpus: corpus
"""
EXPECTED = """
  # $share of this model's weights are its vocabulary's. Of $before of weights and tokenizer this leaves about $after
  # (-$saved)$blocks.
"""
EIGHT_BITS = """
  # 8 bits for each weight, those of the vocabulary too, in a GGUF file, which `pretrain generate` and llama.cpp open
  # (pip install 'pretrain[gguf]').
$expects
  # Smaller still: distil it into one of half its width first, as recipes/compress.yaml does.
  - name: smaller
    stage: export
    checkpoint: $init
    to: gguf
    numbers: q8_0
"""
QUANTISED = """
  # 4 bits a weight, each error made up for by the weights to come, on what your text makes of the model. Smaller
  # still: distil it into one of half its width first, as recipes/compress.yaml does.
$expects
  - name: quantised
    stage: surgery
    checkpoint: $init
    surgeries:
      - {method: gptq, bits: 4, group_size: $group}  # arXiv:2210.17323
    corpus: corpus  # calibration: text like what it will be used on
    length: $length
    calibration_rows: 64
"""
PIXELS = """
  - name: pixels
    stage: processor
    processor:  # all images become $side x $side
      class: ViTImageProcessor
      size: {height: $side, width: $side}
"""
IMAGES = """
  # A masked autoencoder: it learns to fill in hidden patches, without labels. Training on the labels themselves is
  # not possible here yet; a linear probe says how much of them the features show.
  - name: model
    stage: train
    corpus: corpus
    processor: pixels
    objective: native  # the model's own loss
    model:
      family: vit_mae
      image_size: $side
      patch_size: $patch
      hidden_size: 128
      num_hidden_layers: 4
      num_attention_heads: 4
      intermediate_size: 512
      decoder_hidden_size: 64
      decoder_num_hidden_layers: 2
      decoder_num_attention_heads: 4
      decoder_intermediate_size: 256
      initializer_range: 0.06  # 0.7 / sqrt(width)
      mask_ratio: 0.6
    batch_rows: $rows
    optimizer: {method: adamw, lr: 1.5e-3, weight_decay: 0.05}
    budget: $budget
$measured
"""


def written(stage: str, **values: object) -> str:
    """A stage with its values. Lines that stay empty go, as do empty comments; the others stand in one column."""
    lines = Template(stage).substitute({name: str(value).strip("\n") for name, value in values.items()}).splitlines()
    return "\n".join(map(_aligned, filter(str.strip, lines)))


def _aligned(line: str) -> str:
    match = COMMENT.fullmatch(line.rstrip() if not line.endswith("# ") else line)
    if match is None:
        return line
    text = match["line"].rstrip()
    return f"{text:<{COLUMN}} # {match['why']}" if match["why"] else text
