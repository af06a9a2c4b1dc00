import pytest

from tests.cuda.fake import no_cuda_tensors


@pytest.fixture(scope="package", autouse=True)
def cuda_tensors(tmp_path_factory):
    if reason := no_cuda_tensors(tmp_path_factory.mktemp("guard")):
        pytest.skip(f"no CUDA tensors: {reason}")
