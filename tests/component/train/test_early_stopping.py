from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from component.train.early_stopping import EarlyStopping, count_without_progress


def test_evaluations_without_progress_are_counted_from_the_last_gain_above_the_threshold():
    assert count_without_progress([], 0.0, False) == (None, 0)
    assert count_without_progress([(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0)], 0.0, False) == (2, 2)
    assert count_without_progress([(1, 3.0), (2, 2.95), (3, 2.92)], 0.1, False) == (3, 2)
    assert count_without_progress([(1, 3.0), (2, 2.95), (3, 2.5)], 0.1, False) == (3, 0)
    assert count_without_progress([(1, 3.0), (2, 4.0), (3, 3.5)], 0.0, True) == (2, 1)


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.0), (2, 0.3), (3, 0.05)])
def test_a_run_stops_where_transformers_would_stop_it_also_one_that_goes_on(tmp_path, patience, threshold, greater):
    losses = [3.0, 2.5, 2.4, 2.6, 2.39, 2.5, 2.0, 2.1, 2.2, 2.3, 1.0]
    args = TrainingArguments(
        str(tmp_path), metric_for_best_model="loss", greater_is_better=greater, eval_strategy="steps", use_cpu=True
    )
    theirs, state, ours_stop, theirs_stop = EarlyStoppingCallback(patience, threshold), TrainerState(), [], []
    for step, loss in enumerate(losses, 1):
        state.global_step = step
        state.log_history.append({"eval_loss": loss, "step": step})
        for event in ("on_evaluate", "on_train_begin"):
            control = TrainerControl()
            getattr(EarlyStopping(patience, threshold), event)(args, state, control)
            ours_stop.append(control.should_training_stop)
        control = TrainerControl()
        theirs.on_evaluate(args, state, control, {"eval_loss": loss})
        theirs_stop += [control.should_training_stop] * 2
        if state.best_metric is None or (loss > state.best_metric if greater else loss < state.best_metric):
            state.best_metric = loss
    assert ours_stop == theirs_stop
    assert any(ours_stop)


def test_the_evaluation_before_training_does_not_count(tmp_path):
    args = TrainingArguments(str(tmp_path), metric_for_best_model="loss", greater_is_better=False, use_cpu=True)
    history = [{"eval_loss": 1.0 + step, "step": step} for step in range(3)]
    control = TrainerControl()
    EarlyStopping(2, 0.0).on_evaluate(args, TrainerState(log_history=history), control)
    assert not control.should_training_stop


def test_a_run_that_begins_is_not_stopped():
    control = TrainerControl()
    EarlyStopping(1, 0.0).on_train_begin(SimpleNamespace(), TrainerState(), control)
    assert not control.should_training_stop
