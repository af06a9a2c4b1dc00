"""The lecture's topics in order: page -> (title, introduction, experiments)."""

TOPICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sgd": (
        "Stochastic gradient descent",
        "A sum of many terms, a gradient of one of them: what that costs, what it gives, and why it stops short.",
        (
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
    ),
    "adaptive": (
        "Adaptive methods",
        "A step of its own for every coordinate: what that cures, and what it breaks.",
        ("adagrad", "rmsprop", "epsilon", "adadelta", "adam_bias", "amsgrad", "adamw", "rosenbrock"),
    ),
    "norms": (
        "Norms",
        "What steepest descent means depends on how length is measured.",
        ("balls", "oracles", "steepest_family", "gpt_norms"),
    ),
    "muon": (
        "Muon and Shampoo",
        "Spectral descent, how to compute it, and the method that it is a limit of.",
        ("polar_identity", "newton_schulz", "polar_cost", "gpt_momentum", "shampoo", "qk_clip"),
    ),
    "speedrun": (
        "The speedrun",
        "What the methods do to the training of GPT-2 124M on FineWeb, as others have published it.",
        ("speedrun",),
    ),
}
