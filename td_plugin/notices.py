"""What a sparsifier says when a call is legal but probably not what was meant."""

NOT_DRIVEN = (
    "recipe {recipe!r} ramps, but nothing drives it: γ and α stay at their targets; "
    "use TargetedDropoutScheduler, TargetedDropoutCallback or set_progress()"
)
NOT_REMOVABLE = (
    "the outputs of {count} layers (first: {first}) are dropped as units, but what reads them is unknown in {model}: "
    "shrink() will not be able to remove them; prepare(model, example_inputs={{...}}) finds out by tracing"
)
NOTHING_ZEROED = "squash_mask() zeroed nothing: int(γ·n) is 0 in every pool; raise sparsity_level"
