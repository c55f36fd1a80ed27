"""What each of two processes does in test_sharded.py: train a sharded model beside a whole one."""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import lorank
from lorank import AdapterError, LoRA

from .. import models


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, x = models.llama(), models.ids(2, 6)
    lorank.adapt(model, LoRA(rank=2), ["q_proj", "v_proj"], train_also=["lm_head"])
    models.disturb(model)
    whole = copy.deepcopy(model)
    names = list(model.state_dict())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert list(model.state_dict()) == names
    parameters = {id(m): lorank.adapter_parameters(m) for m in (model, whole)}
    torch.testing.assert_close(model(x).logits, whole(x).logits)
    for m in (model, whole):
        optimiser = torch.optim.SGD(parameters[id(m)].values(), lr=0.1)
        m(x, labels=x).loss.backward()
        lorank.check(m)
        optimiser.step()
    torch.testing.assert_close(model(x).logits, whole(x).logits)
    lorank.save(model, folder / f"sharded-{dist.get_rank()}")
    if dist.get_rank() == 0:
        lorank.save(whole, folder / "whole")
    for action in (lorank.merge, lorank.remove, lambda m: lorank.merged(m).__enter__()):
        try:
            action(model)
        except AdapterError as error:
            assert "sharded over processes" in str(error), error
        else:
            raise AssertionError("a sharded model was changed")
    torch.testing.assert_close(model(x).logits, whole(x).logits)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Threads of gloo that outlive the group sometimes abort a process whose interpreter is taken down
    # (pytorch/pytorch#65231), when all is done: it ends without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
