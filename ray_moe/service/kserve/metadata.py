"""What the protocol tells about the server and its models, as messages. Pure."""

from __future__ import annotations

from ray_moe import __version__
from ray_moe.service.kserve.catalog import PLATFORM, VERSION, Model, TensorInfo
from ray_moe.wire.kserve import grpc_service_pb2 as pb

EXTENSIONS = ("model_configuration", "parameters", "statistics")


def server() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name=PLATFORM, version=__version__, extensions=EXTENSIONS)


def metadata(model: Model) -> pb.ModelMetadataResponse:
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=map(_tensor, model.inputs),
        outputs=map(_tensor, model.outputs),
    )


def config(model: Model) -> pb.ModelConfigResponse:
    inputs = [
        pb.ModelInput(name=each.name, data_type=_data_type(each), dims=each.shape, optional=each.optional)
        for each in model.inputs
    ]
    outputs = [pb.ModelOutput(name=each.name, data_type=_data_type(each), dims=each.shape) for each in model.outputs]
    policy = pb.ModelTransactionPolicy(decoupled=model.layer is None)
    return pb.ModelConfigResponse(
        config=pb.ModelConfig(
            name=model.name, backend=PLATFORM, input=inputs, output=outputs, model_transaction_policy=policy
        )
    )


def index(models: list[Model], ready: bool) -> pb.RepositoryIndexResponse:
    """The models, which are ready or not together."""
    state, reason = ("READY", "") if ready else ("UNAVAILABLE", "the service is stopping")
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(name=model.name, version=VERSION, state=state, reason=reason)
            for model in models
        ]
    )


def _tensor(info: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=info.name, datatype=info.datatype, shape=info.shape)


def _data_type(info: TensorInfo) -> pb.DataType.ValueType:
    return pb.DataType.Value("TYPE_STRING" if info.datatype == "BYTES" else f"TYPE_{info.datatype}")
