"""The end of a run whose evaluations get no better."""

from loguru import logger
from transformers import TrainerCallback


class EarlyStopping(TrainerCallback):
    """Ends a run after `patience` evaluations in a row, none of which is better than the best before it by more than
    `threshold`: the rule of transformers' EarlyStoppingCallback.

    The evaluations are read off the run's history, so that a run that goes on decides as one that was not interrupted.
    """

    def __init__(self, patience: int, threshold: float):
        self.patience, self.threshold = patience, threshold

    def on_evaluate(self, args, state, control, **kwargs):
        name = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
        scores = [(entry["step"], entry[name]) for entry in state.log_history if name in entry]
        best_step, without = count_without_progress(scores, self.threshold, bool(args.greater_is_better))
        if without >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.info(
                    f"step {state.global_step}: stopping, as {without} evaluations in a row were not better than step "
                    f"{best_step}'s by more than {self.threshold:g} (early_stopping_patience={self.patience})"
                )

    def on_train_begin(self, args, state, control, **kwargs):
        if state.log_history:
            self.on_evaluate(args, state, control)


def count_without_progress(
    scores: list[tuple[int, float]], threshold: float, greater_is_better: bool
) -> tuple[int | None, int]:
    """The step of the best score of (step, score) pairs, and how many at the end of the list in a row are not better
    than the best before them by more than `threshold`."""
    best_step, best, without = None, None, 0
    for step, score in scores:
        gain = 0.0 if best is None else score - best if greater_is_better else best - score
        without = 0 if best is None or gain > threshold else without + 1
        if best is None or gain > 0:
            best_step, best = step, score
    return best_step, without
