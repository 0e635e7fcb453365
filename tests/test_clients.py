"""In the trainers that people use a learned optimizer takes the very steps that it takes in a plain loop."""

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader, TensorDataset

import odeopt
from odeopt.tasks.datasets import import_torchvision

# what these libraries warn of is theirs
pytestmark = pytest.mark.filterwarnings("ignore")

N_EPOCHS, N_STEPS = 2, 8
PAGES = Path(__file__).resolve().parents[1] / "docs" / "clients"


def needed(name):
    import_torchvision()  # which torchmetrics imports, also where its operators do not fit
    return pytest.importorskip(name, reason="the extra `clients` is not installed")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def data():
    x = torch.rand(64, 2, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (4 * x).sin().prod(1, keepdim=True))


def loader():
    return DataLoader(data(), batch_size=16)


def optimizer_of(model):
    return odeopt.LearnedOptimizer(odeopt.param_groups(model), total_steps=N_STEPS)


@pytest.fixture(scope="module")
def plain():
    """Weights after a plain loop."""
    model = network()
    optimizer = optimizer_of(model)
    for _ in range(N_EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert optimizer.n_steps == N_STEPS
    return model


def assert_same(model, plain):
    start = network()
    for a, b, c in zip(model.parameters(), plain.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def make_lightning_module(lightning, **options):
    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self):
            n_steps = int(self.trainer.estimated_stepping_batches)
            return odeopt.LearnedOptimizer(odeopt.param_groups(self), total_steps=n_steps, **options)

    return Regression()


def test_lightning_takes_the_steps_of_a_plain_loop_and_resumes(plain, tmp_path):
    lightning = needed("lightning")
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(n_epochs, **options):
        return lightning.Trainer(max_epochs=n_epochs, **quiet, **options)

    module = make_lightning_module(lightning)
    whole = trainer(N_EPOCHS, enable_checkpointing=False)
    whole.fit(module, loader())
    assert_same(module.net, plain)
    assert whole.optimizers[0].n_steps == whole.optimizers[0].param_groups[0]["total_steps"] == N_STEPS

    # saved after an epoch, and continued from the file
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    stopping = trainer(N_EPOCHS, enable_checkpointing=False, callbacks=[Stop()])
    stopping.fit(make_lightning_module(lightning), loader())
    module = make_lightning_module(lightning)
    resumed = trainer(N_EPOCHS, enable_checkpointing=False)
    resumed.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(module.net, plain)
    assert resumed.optimizers[0].n_steps == N_STEPS


def test_accelerate_takes_the_steps_of_a_plain_loop(plain):
    accelerator = needed("accelerate").Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(*(lambda net: (net, optimizer_of(net)))(network()), loader())
    for _ in range(N_EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
    assert_same(accelerator.unwrap_model(model), plain)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.optimizer.n_steps == N_STEPS


def test_the_trainer_of_transformers_leaves_step_size_and_groups_alone(plain, tmp_path):
    transformers = needed("transformers")

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    model, rates = Regression(), []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **others):
            rates.append(optimizer.param_groups[0]["lr"])

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=N_EPOCHS, per_device_train_batch_size=16, report_to="none",
        lr_scheduler_type="constant", use_cpu=True, save_strategy="no", disable_tqdm=True, max_grad_norm=0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    examples = [{"x": x, "labels": y} for x, y in data()]
    options = {"params": odeopt.param_groups(model), "total_steps": N_STEPS}
    trainer = transformers.Trainer(
        model, arguments, train_dataset=examples, callbacks=[Look()],
        optimizer_cls_and_kwargs=(odeopt.LearnedOptimizer, options),
    )  # fmt: skip
    trainer.train()
    assert rates == [1.0] * N_STEPS
    assert_same(model.net, plain)


def make_skorch_net(skorch, **options):
    return skorch.NeuralNetRegressor(
        network,
        optimizer=odeopt.LearnedOptimizer,
        optimizer__total_steps=N_STEPS,
        lr=1.0,
        max_epochs=N_EPOCHS,
        batch_size=16,
        train_split=None,
        verbose=0,
        **options,
    )


def test_skorch_takes_the_steps_of_a_plain_loop(plain):
    net = make_skorch_net(needed("skorch"))
    net.fit(*(tensor.numpy() for tensor in data().tensors))
    assert net.optimizer_.n_steps == N_STEPS
    assert_same(net.module_, plain)


def test_trainers_that_pass_a_closure_tell_the_guard_the_losses(plain):
    lightning, skorch = needed("lightning"), needed("skorch")
    module = make_lightning_module(lightning, guard=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=N_EPOCHS, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, loader())
    net = make_skorch_net(skorch, optimizer__guard=True)
    net.fit(*(tensor.numpy() for tensor in data().tensors))
    for optimizer, model in ((trainer.optimizers[0], module.net), (net.optimizer_, net.module_)):
        assert optimizer.guard_status is not None
        assert_same(model, plain)  # no failure, no difference


# -------------------- scripts of several processes, as the pages have them


def script_of(page):
    """The script of a page."""
    [script] = re.findall(r"^```py\n(.*?)^```$", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)
    return script


def launch(script, folder):
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def perceptron(*widths):
    layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def unexplained(model, weights):
    """Share of the target's variance, on points of its own, that a network of the scripts leaves unexplained."""
    model.load_state_dict(weights)
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(7))
    y = (3 * x).sin().sum(1, keepdim=True)
    return (nn.functional.mse_loss(model(x), y) / y.var()).item()


def test_script_of_distributed_data_parallel_learns_and_its_checkpoint_loads_in_one_process(tmp_path):
    launch(script_of("ddp"), tmp_path)
    saved = torch.load(tmp_path / "ddp.pt")
    model = perceptron(2, 32, 1)
    assert unexplained(model, saved["model"]) < 0.2
    optimizer = odeopt.LearnedOptimizer(odeopt.param_groups(model), total_steps=320)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.n_steps == 320


def test_script_of_fsdp2_learns_and_its_checkpoint_holds_whole_tensors(tmp_path):
    launch(script_of("fsdp"), tmp_path)
    dcp_to_torch_save(tmp_path / "fsdp", tmp_path / "whole.pt")
    weights = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    assert unexplained(perceptron(2, 32, 32, 1), weights) < 0.2
