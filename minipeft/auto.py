"""Loading an adapter together with the base model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipeft.configs import PeftConfig
from minipeft.model import PeftModelForCausalLM


class AutoPeftModelForCausalLM:
    """Loads an adapter together with the base model that its configuration names."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model (`kwargs` go to transformers' `from_pretrained`) with the adapter attached.

        Raises FileNotFoundError or ValueError as `PeftModel.from_pretrained`, and ValueError when the adapter does
        not say what its base model is.
        """
        from transformers import AutoModelForCausalLM

        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"the adapter at {str(pretrained_model_name_or_path)!r} names no base model; load the model yourself "
                "and use PeftModel.from_pretrained(model, adapter)"
            )
        base = AutoModelForCausalLM.from_pretrained(
            config.base_model_name_or_path, revision=revision or config.revision or "main", **kwargs
        )
        return PeftModelForCausalLM.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config
        )
