"""Ends a run whose evaluations no longer improve."""

from loguru import logger
from transformers import TrainerCallback


class EarlyStopping(TrainerCallback):
    """Ends a run after `patience` evaluations in a row without progress, as transformers' EarlyStoppingCallback does.

    An evaluation is progress if it is better than the best before it by more than `threshold`. Evaluations are read
    from the run's history, so that a run that goes on decides like one that was not interrupted.
    """

    def __init__(self, patience: int, threshold: float):
        self.patience, self.threshold = patience, threshold

    def on_evaluate(self, args, state, control, **kwargs):
        name = metric_of(args)
        # No checkpoint has the weights of step 0, which eval_on_start evaluates.
        scores = [(entry["step"], entry[name]) for entry in state.log_history if name in entry and entry["step"]]
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


def metric_of(args) -> str:
    """Name, in logs, of the figure by which evaluations are compared."""
    return "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")


def count_without_progress(
    scores: list[tuple[int, float]], threshold: float, greater_is_better: bool
) -> tuple[int | None, int]:
    """Find the best of (step, score) pairs, and count the evaluations since the last progress.

    Returns:
        The step of the best score, and how many scores in a row, at the end of the list, are not better than the best
        before them by more than `threshold`.
    """
    best_step, best, without = None, None, 0
    for step, score in scores:
        gain = 0.0 if best is None else score - best if greater_is_better else best - score
        without = 0 if best is None or gain > threshold else without + 1
        if best is None or gain > 0:
            best_step, best = step, score
    return best_step, without
