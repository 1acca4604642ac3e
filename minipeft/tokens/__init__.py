"""Trained rows of embeddings: the vectors of chosen tokens, alone or beside LoRA (PEFT's trainable tokens)."""

from minipeft.methods import Registration

METHODS = (
    Registration(
        "trainable_tokens",
        peft_type="TRAINABLE_TOKENS",
        config="minipeft.tokens.config:TrainableTokensConfig",
        attach="minipeft.tokens.config:TOKENS",
        rows="minipeft.tokens.config:check_rows",
        tuner="minipeft.tokens.wrapper:TrainableTokensModel",
        prefix="trainable_tokens_",
    ),
)
