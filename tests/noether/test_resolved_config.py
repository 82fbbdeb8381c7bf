"""A resolved config that was written for Noether starts training unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ground_truth import bind_target, digests, expected, file_digests, models_module, paths_for, runs_folder

from noether_init_core import InitializerStack, TrainingIteration

pytestmark = pytest.mark.skipif(runs_folder() is None, reason="the folder shared/noether_runs is absent")

WARM_START = """\
config_schema_kind: my.Config
stage_name: finetune
model:
  kind: my.models.AutoEncoder
  name: student
  encoder:
    kind: my.models.Encoder
    name: enc_net
    initializers:
    - kind: noether.core.initializers.PreviousRunInitializer
      run_id: composite
      stage_name: pretrain
      model_name: autoenc.encoder
      checkpoint_tag: {update: 6}
      load_optim: false
  decoder:
    kind: my.models.Decoder
    initializers: null
trainer:
  kind: my.Trainer
  initializer: null
"""

RESUME = """\
model:
  name: autoenc
resume_run_id: composite
resume_stage_name: pretrain
resume_checkpoint: E2_U9_S54
trainer:
  max_epochs: 3
"""


def test_a_list_of_a_submodel_is_for_that_submodel(tmp_path: Path) -> None:
    """The encoder gets the weights of update 6; the decoder keeps its own; training starts at zero."""
    path = tmp_path / "hp_resolved.yaml"
    path.write_text(WARM_START)
    module = models_module().build("composite", seed=4)
    before = digests(module)
    report = InitializerStack.from_file(path, path_provider=paths_for("composite")).initialize(
        bind_target(module, "student")
    )
    encoder = file_digests("composite", "autoenc.encoder_cp=E1_U6_S36_model.th")
    assert digests(module) == {**before, **{f"encoder.{name}": value for name, value in encoder.items()}}
    assert report.start.is_zero
    assert report.initializers[0].hooks == ("init_weights", "init_optimizer")


def test_a_resume_at_the_root_resumes_everything(tmp_path: Path) -> None:
    """Weights, moments and start come from the tag that the root names."""
    path = tmp_path / "hp_resolved.yaml"
    path.write_text(RESUME)
    module = models_module().build("composite", seed=4)
    optimizers = models_module().make_optimizers("composite", module)
    model = bind_target(module, "autoenc", {"encoder": optimizers["encoder"][0]})
    report = InitializerStack.from_file(path, path_provider=paths_for("composite")).initialize(model)
    assert report.start == TrainingIteration(2, 9, 54)
    wanted = {
        f"{part}.{name}": value
        for part in ("encoder", "decoder")
        for name, value in file_digests("composite", f"autoenc.{part}_cp=E2_U9_S54_model.th").items()
    }
    assert digests(module) == wanted
    assert torch.equal(optimizers["encoder"][0].state[module.encoder.token]["step"], torch.tensor(9.0))
    assert expected("composite")["run_id"] == "composite"
