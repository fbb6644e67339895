"Category-agnostic pose estimation: what a user types is here, and is imported when it is first asked for."

__version__ = "0.1.0"

from importlib import import_module as _import_module

_PUBLIC = {
    "cape.errors": ["CapeError", "DataError", "MissingFileError", "StorageError", "ConfigError", "CheckpointError",
                    "TrainingError"],
    "cape.data.annotations": ["PoseDataset", "Category", "Instance", "data_home"],
    "cape.data.crops": ["Augment"],
    "cape.data.episodes": ["EpisodeBatch", "TrainEpisodes", "TrainImages", "TestEpisodes"],
    "cape.models.base": ["CapeModel", "Prediction", "create_model", "list_models", "register_model",
                         "save_model", "load_model", "list_weights"],
    "cape.models.official": ["load_official", "download_official"],
    "cape.learner": ["Learner", "TrainConfig", "PRESETS"],
    "cape.evaluation": ["evaluate", "Report"],
    "cape.estimator": ["PoseEstimator", "predict_folder"],
    "cape.escape_recipe": ["fit_escape"],
    "cape.models.inference": ["quick"],
    "cape.data.converters": ["read_poses", "write_poses"],
    "cape.export": ["export_onnx"],
    "cape.photos": ["PhotoPose", "PhotoPoses", "read_photo"],
}
_MODULES = ["metrics", "pictures"]
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name):
    "The public `name`, imported now: `import cape` alone costs no torch (PEP 562)"
    if name in _MODULES: return _import_module(f"cape.{name}")
    if name not in _WHERE: raise AttributeError(f"module 'cape' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(_WHERE[name]), name)
    return value


def __dir__(): return sorted([*globals(), *__all__])
