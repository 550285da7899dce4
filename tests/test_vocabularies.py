"""Checkpoints and tokenizers that meet must number their tokens alike, however many rows they have."""

from __future__ import annotations

import copy
import json

import pytest
from small_recipe import small_recipe

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import _ref_fields, method_class
from pretrain.core.models.heads import with_head
from pretrain.core.quick.vocabulary import check_alike, check_labels, labels_in, numbers_of, stored_numbers
from pretrain.core.registry import methods
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.inference.predict import predict
from pretrain.interactive import generate
from pretrain.recipe import load
from pretrain.stages.evaluate import load_both
from pretrain.surgery import Inputs, operate
from pretrain.surgery.merging.model_soup import ModelSoup

SIZE = 400
# References of methods that need not share the model's vocabulary, and why.
OTHERWISE = {
    "a model that reads texts with its own tokenizer": (
        "bertin.reference", "clear.model", "entigraph.generator", "llm2llm.generator", "llm2llm.student", "miniplm.teacher", "miniplm.reference", "preselect.models", "prompt_template.model", "prox.generator",
        "quality_subset.reference", "salt_ds.model", "simcore.model", "spin.generator", "transform_llm.generator", "well_read_students.teacher", "wrap.generator",
    ),
    "what the vocabulary is changed to": ("contextual_rows.tokenizer", "ofa.tokenizer", "vocabulary_expansion.tokenizer"),
    "a tokenizer that counts or parts texts, with no model beside": ("document_statistics.tokenizer", "exact_substring_deduplication.tokenizer"),
    "documents": ("contextual_rows.corpus", "decontaminate.corpora", "label_words.pool", "llm2llm.pool", "long_tail_entities.triples", "min_k.members", "model_soup.corpus", "preselect.target", "dictionary_tags.dictionary", "reference_classifier.positive", "reference_classifier.negative", "simcore.target", "task.pool", "vocabulary_expansion.corpus"),
    "files without tokens": ("entigraph.prompts", "error_correction.rules", "grammatical_errors.rules", "harness.folder", "homer.bias", "llm2llm.prompts", "ofa.vectors", "prox.prompts", "softmax_cascade.calibration", "source_language.embeddings", "spin.prompts", "transform_llm.prompts", "wrap.prompts"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(stories):
    """Of one size: one of the stories, and one of other words."""
    texts = [story["text"] for story in stories[:30]]
    words = ["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich " * 30] * 3
    words += [" ".join(f"xq{a}{b}z" for a in "ABCDEFGHKLM" for b in "PQRSTUVWXYZ") * 5] * 3
    first, second = (train_tokenizer(of, vocab_size=SIZE) for of in (texts, words))
    assert len(first) == len(second) == SIZE
    return first, second


@pytest.fixture(scope="module")
def shelf(tokenizers, tiny, tmp_path_factory):
    """Checkpoints of as many rows: `own`, `other` of another tokenizer, `longer` of one with one more, `bare` of none."""
    folder, (own, other) = tmp_path_factory.mktemp("shelf"), tokenizers
    longer = copy.deepcopy(own)
    longer.add_tokens(["<somewhere>"])
    kept = {"own": own, "other": other, "longer": longer, "bare": None}
    for number, (name, tokenizer) in enumerate(kept.items()):
        checkpoint.save(tiny(vocab_size=SIZE + 1, seed=number), tokenizer, folder / name)
    return folder


@pytest.fixture
def recipe(tmp_path, stories):
    (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], budget={"steps": 2}))
    return tmp_path / "r.yaml"


FIRST = r"token \d+ is '.+' in .+ and '.+' in .+; accepted: vocabularies of which the shorter"


@pytest.mark.promise(
    "Vocabularies",
    "Where two checkpoints meet, or a checkpoint and a tokenizer, a token that is numbered otherwise is refused, and the first named, however many rows both have; one vocabulary may be the beginning of the other.",
)
def test_the_first_token_that_differs_is_named():
    a, b = {"a": 0, "b": 1, "c": 2, "d": 3}, {"a": 0, "x": 1, "y": 2, "d": 3}
    with pytest.raises(PretrainError, match="soup: token 1 is 'x' in two and 'b' in one; accepted"):
        check_alike("soup", {"one": a, "none": None, "two": b})
    with pytest.raises(PretrainError, match="soup: token 2 is 'b' in two and token 1 in one; accepted"):
        check_alike("soup", {"one": {"a": 0, "b": 1}, "two": {"a": 0, "b": 2}})
    check_alike("soup", {"one": a, "two": dict(list(a.items())[:2]), "three": a | {"e": 4}})
    with pytest.raises(PretrainError, match="token 4 is 'f' in three and 'e' in two"):
        check_alike("soup", {"one": a, "two": a | {"e": 4}, "three": a | {"f": 4}})


@pytest.mark.parametrize("algorithm", ["bpe", "bytes", "unigram"])
def test_what_is_read_from_the_file_is_what_the_tokenizer_says(stories, tmp_path, algorithm):
    made = train_tokenizer([s["text"] for s in stories[:10]], algorithm=algorithm, vocab_size=300, mask=True)
    made.save_pretrained(tmp_path)
    assert stored_numbers(tmp_path) == numbers_of(made) == made.get_vocab()


@pytest.mark.promise("Vocabularies", "Each method says which of its references share the vocabulary.")
def test_each_reference_of_each_method_says_whether_it_shares_the_vocabulary():
    excepted = {name for names in OTHERWISE.values() for name in names}
    every = {}
    for info in methods().values():
        cls = method_class(info.name, info.kind)
        assert set(cls.shares_vocabulary) <= set(_ref_fields(cls)), info.name
        every |= {f"{info.name}.{name}": name in cls.shares_vocabulary for name in _ref_fields(cls)}
    assert {name for name, shared in every.items() if not shared} == excepted


SURGERIES = {
    "instruction_residual": {"base": "own", "instruct": "other"},
    "instruction_vector": {"base": "other", "instruct": "own"},
}


@pytest.mark.promise(
    "Vocabularies", "Instruction merges of two vocabularies are refused, when they are planned and when they are made."
)
@pytest.mark.parametrize("name", SURGERIES)
def test_merges_refuse_it_when_they_are_planned_and_when_they_are_made(shelf, name):
    references = {field: str(shelf / folder) for field, folder in SURGERIES[name].items()}
    surgery = method_class(name, "surgery")(**references)
    model, tokenizer = checkpoint.load(shelf / "own")
    with pytest.raises(PretrainError, match=f"{name}: {FIRST}"):
        operate([surgery], model, Inputs(tokenizer=tokenizer))
    fine = method_class(name, "surgery")(base=str(shelf / "bare"), instruct=str(shelf / "longer"))
    operate([fine], model, Inputs(tokenizer=tokenizer))


@pytest.mark.promise("Vocabularies", "Soups of two vocabularies are refused.")
def test_a_soup_of_two_vocabularies_is_refused(shelf):
    (model, tokenizer), *others = (checkpoint.load(shelf / name) for name in ("own", "longer", "bare", "other"))
    models, tokenizers = zip(*others, strict=True)
    fine = Inputs(tokenizer=tokenizer, models=models[:2], tokenizers=tokenizers[:2])
    ModelSoup(recipe="uniform")(model, fine)
    with pytest.raises(PretrainError, match=f"model_soup: {FIRST}"):
        ModelSoup(recipe="uniform")(model, Inputs(tokenizer=tokenizer, models=models, tokenizers=tokenizers))


SOUP = {"method": "model_soup", "recipe": "uniform"}


def surgery_recipe(tmp_path, **fields):
    stage = {"stage": "surgery", "name": "merged"} | fields
    (tmp_path / "s.yaml").write_text(json.dumps({"stages": [stage]}))
    return tmp_path / "s.yaml"


@pytest.mark.promise(
    "Vocabularies",
    "Where both vocabularies are there as files with a `tokenizer.json`, the recipe is refused before anything is run, else when they are opened.",
)
def test_a_surgery_stage_is_refused_before_anything_is_run(shelf, tmp_path):
    soup = {"checkpoint": str(shelf / "own"), "surgeries": [SOUP]}
    load(surgery_recipe(tmp_path, **soup, models=[str(shelf / "longer"), str(shelf / "bare")]))
    with pytest.raises(PretrainError, match=f"merged.models: surgery: {FIRST}"):
        load(surgery_recipe(tmp_path, **soup, models=[str(shelf / "longer"), str(shelf / "other")]))
    residual = {"method": "instruction_residual", "base": str(shelf / "own"), "instruct": str(shelf / "other")}
    with pytest.raises(PretrainError, match=f"merged.surgeries.0.instruct: instruction_residual: {FIRST}"):
        load(surgery_recipe(tmp_path, checkpoint=str(shelf / "own"), surgeries=[residual]))


@pytest.mark.promise("Vocabularies", "Surgeries whose work it is may change the vocabulary.")
def test_a_surgery_that_changes_the_vocabulary_may(shelf, tmp_path):
    grown = {"method": "vocabulary_expansion", "tokenizer": str(shelf / "other"), "initialisation": "univariate"}
    done = engine.run(
        load(surgery_recipe(tmp_path, checkpoint=str(shelf / "own"), surgeries=[grown]), [], tmp_path / "out"),
        say=engine.silent,
    )
    made, own = (stored_numbers(folder) for folder in (done.folder / "merged", shelf / "own"))
    assert len(made) > len(own) and made.items() >= own.items()
    soup = {"checkpoint": str(shelf / "own"), "surgeries": [grown, SOUP], "models": [str(shelf / "other")]}
    load(surgery_recipe(tmp_path, **soup))  # what its models share is known when it has run
    with pytest.raises(PretrainError, match="model_soup: models.0"):
        engine.run(load(surgery_recipe(tmp_path, **soup), [], tmp_path / "soup"), say=engine.silent)


@pytest.mark.promise("Vocabularies", "Teachers and companions of another vocabulary are refused.")
@pytest.mark.parametrize("taught", ["distillation", "salt", "self_distillation", "pela_pretraining", "ctcd", "random_token_substitution"])  # fmt: skip
def test_objectives_refuse_a_teacher_of_other_tokens(shelf, taught, recipe, tmp_path):
    field = {"ctcd": "companion_init", "random_token_substitution": "embeddings"}.get(taught, "teacher")
    init = [f"model.init={shelf / 'own'}", "model.model={}", "model.tokenizer=null"]
    init += [f"model.objective={{method: {taught}, {field}: {shelf / 'other'}}}"]
    with pytest.raises(PretrainError, match=f"model.objective.{field}: {taught}: {FIRST}"):
        load(recipe, init, tmp_path / "out")
    from_stage = [f"model.objective={{method: {taught}, {field}: {shelf / 'other'}}}"]
    if taught in ("random_token_substitution", "self_distillation"):
        from_stage += ["model.model={family: bert, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"]  # fmt: skip
    with pytest.raises(PretrainError, match=f"'model': {taught}: {FIRST}"):
        engine.run(load(recipe, from_stage, tmp_path / "out"), say=engine.silent)


@pytest.mark.promise("Vocabularies", "A checkpoint without a tokenizer is taken as it is.")
def test_a_teacher_of_the_same_tokens_or_of_none_that_are_known_teaches(shelf, recipe, tmp_path):
    for teacher in ("longer", "bare"):
        init = [f"model.init={shelf / 'own'}", "model.model={}", "model.tokenizer=null"]
        init += [f"model.objective={{method: distillation, teacher: {shelf / teacher}}}"]
        done = engine.run(load(recipe, init, tmp_path / teacher), say=engine.silent)
        assert done.stages["model"]["metrics"]["steps"] == 2


@pytest.mark.promise(
    "Vocabularies",
    "Training goes on with the tokenizer of its checkpoint: `init` with a `tokenizer` that numbers otherwise is refused.",
)
def test_training_goes_on_with_the_tokenizer_of_its_checkpoint(shelf, recipe, tmp_path):
    changes = [f"model.init={shelf / 'own'}", "model.model={}"]
    with pytest.raises(PretrainError, match=f"model.tokenizer: train: {FIRST}"):
        load(recipe, [*changes, f"model.tokenizer={shelf / 'other'}"], tmp_path / "out")
    with pytest.raises(PretrainError, match=f"stage 'model': {FIRST}"):  # the tokenizer is that of an earlier stage
        engine.run(load(recipe, changes, tmp_path / "out"), say=engine.silent)
    for name, tokenizer in (("own", "longer"), ("longer", "own")):
        more = [f"model.init={shelf / name}", "model.model={}", f"model.tokenizer={shelf / tokenizer}"]
        done = engine.run(load(recipe, more, tmp_path / name), say=engine.silent)
        assert done.stages["model"]["metrics"]["steps"] == 2


@pytest.mark.promise("Vocabularies", "Helpers in decoding of another vocabulary are refused.")
def test_decoding_refuses_helpers_of_other_tokens(shelf, tmp_path):
    proxy = {"method": "proxy_tuning", "expert": str(shelf / "own"), "anti_expert": str(shelf / "other")}
    model, tokenizer = checkpoint.load(shelf / "own")
    built = method_class("proxy_tuning", "decoding")(expert=proxy["expert"], anti_expert=proxy["anti_expert"])
    with pytest.raises(PretrainError, match=f"proxy_tuning: {FIRST}"):
        generate(model, tokenizer, "def", method=built, temperature=0, max_new_tokens=2)
    stage = {"stage": "decode", "name": "say", "checkpoint": str(shelf / "own"), "prompts": ["a"], "method": proxy}
    (tmp_path / "d.yaml").write_text(json.dumps({"stages": [stage]}))
    with pytest.raises(PretrainError, match=f"say.method.anti_expert: proxy_tuning: {FIRST}"):
        load(tmp_path / "d.yaml")


NAMES = {"own": ("bad", "good"), "swapped": ("good", "bad"), "others": ("x", "y"), "bare": ("LABEL_0", "LABEL_1")}


@pytest.fixture(scope="module")
def classifiers(tokenizers, tiny, tmp_path_factory):
    """Checkpoints of classifiers of two classes each, by what they call them; `several` gives several to a document."""
    folder, (own, _) = tmp_path_factory.mktemp("classifiers"), tokenizers
    for name, labels in (NAMES | {"several": NAMES["own"], "alike": ("good", "good")}).items():
        model = with_head(tiny("bert", vocab_size=SIZE), "sequence", ("a", "b"), Vocabulary.of(own))
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        model.config.problem_type = "multi_label_classification" if name == "several" else None
        checkpoint.save(model, own, folder / name)
    return folder


def test_the_first_label_that_differs_is_named():
    ours = ("single_label_classification", "bad", "good")
    with pytest.raises(PretrainError, match="soup: label 1 is 'worse' in two and 'good' in one; accepted: classif"):
        check_labels("soup", {"one": ours, "none": None, "two": (*ours[:2], "worse")})
    with pytest.raises(PretrainError, match="soup: label 2 is 'worse' in two and none in one; accepted"):
        check_labels("soup", {"one": ours, "two": (*ours, "worse")})
    with pytest.raises(PretrainError, match="soup: problem_type is 'multi_label_classification' in two and 'single_l"):
        check_labels("soup", {"one": ours, "two": ("multi_label_classification", *ours[1:])})
    names = {str(number): str(number) for number in range(11)}  # whose order is not that of their texts
    read = labels_in({"architectures": ["BertForSequenceClassification"], "id2label": names})
    assert read == ("single_label_classification", *names)


@pytest.mark.promise(
    "Vocabularies",
    "Classifiers that call a class otherwise, or answer in another way, are neither merged nor taught by one another, and the first label that differs is named; classes without names are taken as they are.",
)
@pytest.mark.parametrize("other", ["swapped", "others", "several"])
@pytest.mark.parametrize(
    "surgery",
    [
        {"method": "linear_merge", "models": ["OTHER"]}, {"method": "slerp", "other": "OTHER"},
        {"method": "ties", "models": ["OTHER"]}, {"method": "model_stock", "models": ["OTHER", "OTHER"]},
        {"method": "passthrough", "models": ["OTHER"], "slices": [[0, 0, 1], [1, 1, 2]]},
        {"method": "instruction_residual", "base": "OWN", "instruct": "OTHER"}, SOUP,
    ],
    ids=lambda surgery: surgery["method"],
)  # fmt: skip
def test_classifiers_of_other_labels_are_not_merged(classifiers, surgery, other, tmp_path):
    place, own = str(classifiers / other), str(classifiers / "own")
    filled = json.loads(json.dumps(surgery).replace("OTHER", place).replace("OWN", own))
    wrong = "problem_type is 'multi_label" if other == "several" else f"label 0 is '{NAMES[other][0]}' in "
    more = {"models": [place]} if surgery is SOUP else {}
    with pytest.raises(PretrainError, match=wrong):  # before anything is run
        load(surgery_recipe(tmp_path, checkpoint=own, surgeries=[filled], **more))
    model, tokenizer = checkpoint.load(own)
    opened = checkpoint.load(place)
    inputs = Inputs(tokenizer=tokenizer, models=[opened[0]], tokenizers=[opened[1]])
    name = filled.pop("method")
    built = method_class(name, "surgery")(**filled)
    with pytest.raises(PretrainError, match=wrong):
        operate([built], model, inputs)
    with pytest.raises(PretrainError, match=wrong):  # nor without a look at the files before
        built(model, inputs)


def test_a_classifier_whose_classes_have_no_names_is_merged(classifiers, tmp_path):
    merge = {"method": "linear_merge", "models": [str(classifiers / "bare")]}
    recipe = surgery_recipe(tmp_path, checkpoint=str(classifiers / "own"), surgeries=[merge])
    engine.run(load(recipe, [], tmp_path / "out"), say=engine.silent)


@pytest.mark.promise("Vocabularies", "Classifiers that call a class otherwise")
def test_a_classifier_is_not_taught_by_one_of_other_labels(classifiers, recipe, tmp_path):
    changes = [f"model.init={classifiers / 'own'}", "model.model={}", "model.tokenizer=null"]
    taught = f"model.objective={{method: distillation, objective: masked_lm, teacher: {classifiers / 'swapped'}}}"
    with pytest.raises(PretrainError, match="model.objective.teacher: distillation: label 0 is 'good' in teacher"):
        load(recipe, [*changes, taught], tmp_path / "out")


@pytest.mark.promise(
    "Vocabularies", "A classifier of which two classes have one name is not opened to predict, to measure or to teach."
)
def test_two_classes_of_one_name_are_refused(classifiers):
    folder = classifiers / "alike"
    wrong = "alike.*: id2label calls 0 and 1 both 'good'; accepted: a name for each class"
    with pytest.raises(PretrainError, match=wrong):
        predict(folder, ["a text"])
    with pytest.raises(PretrainError, match=wrong):
        load_both(folder)
    with pytest.raises(PretrainError, match=wrong):
        method_class("well_read_students", "objective")(teacher=str(folder)).labels(())
