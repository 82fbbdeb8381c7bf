"""Train on handwritten digits. Killed anywhere and started again unedited, it ends with the same bits."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import TASKS, LossLog, Network, accuracy, augment, training_data
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from noether_init_core import CheckpointWriter, InitializerStack, PathProvider, TrainerState, bind


def train(paths: PathProvider, config: Path, task: str, epochs: int, images: int) -> None:
    """The plain loop. What noether-init-core needs: the lines with ``state``, ``model``, ``writer`` and the stack."""
    torch.manual_seed(0)
    data = training_data(task, images)
    network = Network(classes=TASKS[task])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * -(-len(data) // 50))
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

    state = TrainerState(seed=0, schedule=schedule, ema=ema)
    loader = state.loader(data, batch_size=50)
    model = bind(network, name="digits", optimizer=optimizer)
    writer = CheckpointWriter(paths, keep_last=3)
    report = InitializerStack.from_file(config, path_provider=paths).initialize(model, trainer=state)
    print(report, flush=True)

    log = LossLog(paths.run_output_path / "losses.jsonl")
    while state.epoch < epochs:
        for inputs, labels in loader:
            network.train()
            loss = network.loss(augment(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            ema.update_parameters(network)
            state.advance()
            log.write(state.update, loss.item())
            if state.update % 12 == 0 or state.epoch == epochs:
                writer.save(model, trainer=state, averages={"ema=0.95": ema.module.state_dict()})
        print(f"{state.iteration}  accuracy {accuracy(network, task):.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-root", type=Path, default=Path("runs"), help="the folder of all runs")
    parser.add_argument("--run-id", default="digits", help="the same id continues the run, another one starts another")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("init.yaml"), help="how the run starts")
    parser.add_argument("--task", choices=TASKS, default="digit")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=1400, help="how many of the 1400 training images to use")
    arguments = parser.parse_args()

    # The same numbers in every process: with one thread, sums are always made in the same order.
    torch.set_num_threads(1)
    train(
        PathProvider(arguments.output_root, arguments.run_id),
        arguments.config,
        arguments.task,
        arguments.epochs,
        arguments.images,
    )
