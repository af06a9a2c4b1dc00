"""The lecture's topics in order: page -> experiments."""

TOPICS: dict[str, tuple[str, ...]] = {
    "sgd": (
        "finite_sum",
        "trajectories",
        "noise_ball",
        "decreasing_step",
        "convex_average",
        "pl",
        "descent_lemma",
        "batch_size",
        "momentum",
        "newton",
    ),
    "adaptive": ("adagrad", "rmsprop", "epsilon", "adadelta", "adam_bias", "amsgrad", "adamw", "rosenbrock"),
    "norms": ("balls", "oracles", "steepest_family", "gpt_norms"),
    "muon": ("polar_identity", "newton_schulz", "polar_cost", "gpt_momentum", "shampoo", "qk_clip"),
    "speedrun": ("speedrun",),
}
