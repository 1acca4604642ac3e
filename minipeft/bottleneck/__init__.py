"""Bottleneck adapters (Houlsby et al. 2019): a small network after a part of each layer."""

from minipeft.methods import Registration

METHODS = (
    Registration(
        "bottleneck",
        peft_type="BOTTLENECK",
        config="minipeft.bottleneck.config:BottleneckConfig",
        attach="minipeft.bottleneck.layer:BOTTLENECK",
        rows="minipeft.bottleneck.combine:check_rows",
        combine="minipeft.bottleneck.combine:add_weighted_adapter",
        # The learning rate is the best of those tried on the demo's task, see docs/comparison.md.
        prefix="bottleneck",
        compare_defaults={"lr": 1e-3, "method_args": {"reduction_factor": 16}},
    ),
)
