"""Lightning's Trainer on flagos through torch_fl.lightning: fit, validate, save, resume; losses as on the CPU."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("lightning") is not None:
    import lightning.pytorch as pl
else:
    pl = pytest.importorskip("pytorch_lightning", reason="lightning is not installed: pip install pytorch-lightning")

import torch_fl.lightning

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.losses, self.validated, self.dtypes = [], [], set()

    def loss(self, batch):
        x, y = batch
        assert x.device == self.device
        out = self.layers(x)
        self.dtypes.add(out.dtype)
        return torch.nn.functional.mse_loss(out.float(), y)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.validated.append(self.loss(batch).item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def loader():
    data = torch.utils.data.TensorDataset(
        torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), torch.ones(40, 1)
    )
    return torch.utils.data.DataLoader(data, batch_size=8, pin_memory=True)


def fit(where, folder, checkpoint=None, **options):
    place = {"accelerator": "cpu"} if where == "cpu" else {"accelerator": "flagos", "strategy": "flagos", "devices": 1}
    save = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    settings = {"max_steps": 20, "callbacks": [save], "num_sanity_val_steps": 0, "gradient_clip_val": 1.0}
    trainer, net = pl.Trainer(**{**QUIET, **place, **settings, **options}), Net()
    trainer.fit(net, loader(), loader(), ckpt_path=checkpoint)
    return trainer, net


def test_fit_validate_save_resume(tmp_path):
    trainer, here = fit("flagos", tmp_path / "flagos")
    assert trainer.strategy.root_device.type == "flagos"
    _, there = fit("cpu", tmp_path / "cpu")
    assert len(here.losses) == 20 and here.losses == pytest.approx(there.losses, rel=1e-4)
    assert here.validated and here.validated == pytest.approx(there.validated, rel=1e-4)
    _, resumed = fit("flagos", tmp_path / "again", checkpoint=str(tmp_path / "flagos" / "step=10.ckpt"))
    assert resumed.losses == pytest.approx(here.losses[10:], rel=1e-6)
    for actual, expected in zip(resumed.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_mixed_precision(tmp_path):
    precision = pl.plugins.precision.MixedPrecision("bf16-mixed", device="flagos")
    _, mixed = fit("flagos", tmp_path, plugins=[precision])
    _, plain = fit("flagos", tmp_path)
    assert mixed.dtypes == {torch.bfloat16} and mixed.losses == pytest.approx(plain.losses, rel=0.05)


def test_accelerator_answers():
    accelerator = torch_fl.lightning.FlagosAccelerator()
    assert accelerator.is_available() and accelerator.name() == "flagos" and accelerator.auto_device_count() == 1
    assert accelerator.get_parallel_devices(accelerator.parse_devices("01")) == [
        torch.device("flagos", k) for k in (0, 1)
    ]
    assert "allocated_bytes.all.current" in accelerator.get_device_stats("flagos:0")
