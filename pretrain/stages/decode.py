"""`decode`: continue prompts with a checkpoint; writes `samples.json`."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import ConfigDict, Field

from pretrain.stages import DecodingField, Job, Ref, Stage, checkpoint_of


class Decode(Stage):
    """Fields of a `decode` stage. `temperature` 0 is greedy; `method` names a decoding method instead."""

    stage: Literal["decode"] = "decode"
    checkpoint: Ref
    prompts: list[str] = Field(min_length=1)
    method: DecodingField | None = None
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)

    model_config = ConfigDict(protected_namespaces=())

    def run(self, job: Job) -> dict[str, Any]:
        """Write `samples.json`."""
        from pretrain.core import checkpoint
        from pretrain.core.files import write_json
        from pretrain.core.hardware import pick_device

        model, tokenizer = checkpoint.load(checkpoint_of(job.inputs["checkpoint"]), device=pick_device())
        samples = [
            continue_prompt(
                model, tokenizer, prompt, method=self.method, max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, top_p=self.top_p, seed=job.seed + number,
            )
            for number, prompt in enumerate(self.prompts)
        ]  # fmt: skip
        write_json(job.folder / "samples.json", {"samples": samples})
        seconds = sum(s["seconds"] for s in samples)
        return {"metrics": {"tokens_per_second": sum(s["tokens"] for s in samples) / max(seconds, 1e-9)}}


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    method: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """One continuation: prompt, continuation, tokens, seconds."""
    import torch

    from pretrain.core.batch import Vocabulary
    from pretrain.core.errors import PretrainError

    if method is None and not model.can_generate():
        raise PretrainError(f"{type(model).__name__} predicts no next token; accepted: a causal or seq2seq model")
    vocabulary = Vocabulary.of(tokenizer)
    before = [vocabulary.bos] if vocabulary.bos is not None else []
    ids = before + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    input_BL = torch.tensor([ids or [vocabulary.pad]], device=model.device)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.no_grad():
        if method is not None:
            output_BN = method.generate(
                model, input_BL, max_new_tokens=max_new_tokens, eos=vocabulary.eos, pad=vocabulary.pad
            )
        else:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}
            output_BN = model.generate(
                input_BL, attention_mask=torch.ones_like(input_BL), max_new_tokens=max_new_tokens,
                eos_token_id=vocabulary.eos, pad_token_id=vocabulary.pad, **(sampling or {"do_sample": False}),
            )  # fmt: skip
    new = output_BN[0, input_BL.shape[1] :].tolist()
    return {
        "prompt": prompt,
        "continuation": tokenizer.decode(new, skip_special_tokens=True),
        "method": method.name if method is not None else ("sampling" if temperature else "greedy"),
        "tokens": len(new),
        "seconds": time.perf_counter() - started,
    }
