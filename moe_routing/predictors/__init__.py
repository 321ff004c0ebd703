"""What can be known before the gate has run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "baselines": [
            "HORIZONS", "COVERAGE", "BASELINES", "Horizon", "shift", "look", "random_value", "Tally", "Predictor",
            "move", "default_device", "targets", "RandomGuess", "Marginal", "Table", "PreviousToken",
            "PreviousLayer", "PreviousLayerTable", "GateOn", "make_baselines",
        ],
        "learned": [
            "LOSSES", "PREDICTORS", "PRESETS", "Standardise", "ByLayer", "Learned", "LinearGuess", "LowRank",
            "MLPGuess", "TokenEmbedding", "History", "SeedSimple", "SeedHybrid", "SeedTransformer", "Entry",
            "make_predictor", "tally", "Recipe", "make_recipe", "train_predictor",
        ],
        "evaluate": [
            "Evaluation", "evaluate_predictors", "rank_tokens",
        ],
    },
)
