"""The controls never look at the query, and the mean pose never contains it."""
import torch

from cape.data.episodes import EpisodeBatch
from cape.models.base import check_contract, create_model
from cape.models.controls import MeanPose


def test_copy_keeps_the_contract(): check_contract(create_model("copy"), shots=3)


class Few:
    "Four instances of two categories, whose crops are 100 px wide and start at (0, 0)."
    name = "few"
    def __init__(self):
        import numpy as np
        from types import SimpleNamespace as Thing
        rng = np.random.default_rng(0)
        self.points = rng.uniform(20, 80, (4, 3, 2)).astype(np.float32)
        flags = np.full((4, 3), 2, np.uint8)
        flags[1, 0] = 0
        self.instances = [Thing(keypoints=p, visibility=f, clean_box=(10., 10., 80., 80.)) for p, f in zip(self.points, flags)]
        self.by_category = {5: [0, 1, 2], 9: [3]}
    def __len__(self): return 4


def ask(index, category): return EpisodeBatch(support_keypoints=torch.zeros(1, 1, 3, 2), query_index=torch.tensor([index]),
                                              category=torch.tensor([category]))


def test_mean_pose_leaves_the_query_out():
    few = Few()
    answer = MeanPose().fit(few)(ask([0, 1, -1], 5)).keypoints[0]
    points = torch.from_numpy(few.points) / 100
    assert torch.allclose(answer[0, 1:], points[[1, 2]].mean(0)[1:], atol=1e-5)
    assert torch.allclose(answer[0, 0], points[2, 0], atol=1e-5)       # instance 1 does not show keypoint 0
    assert torch.allclose(answer[1], points[[0, 2]].mean(0), atol=1e-5)
    assert torch.allclose(answer[2, 1:], points[:3].mean(0)[1:], atol=1e-5)   # a query from elsewhere


def test_the_only_instance_of_a_category_answers_the_middle():
    answer = MeanPose().fit(Few())(ask([3], 9))
    assert (answer.keypoints == .5).all() and (answer.confidence == 0).all()
