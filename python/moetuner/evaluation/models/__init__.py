"""Sizes of models: from their config.json, from a table of families, or as given."""

from moetuner.evaluation.models.config_json import model_of as model_of
from moetuner.evaluation.models.config_json import read_model as read_model
from moetuner.evaluation.models.families import find_model as find_model
from moetuner.evaluation.models.families import known_names as known_names
from moetuner.evaluation.models.families import shape_for_model as shape_for_model
from moetuner.evaluation.models.model import Model as Model
from moetuner.evaluation.models.shape import DEFAULT_SHAPE as DEFAULT_SHAPE
from moetuner.evaluation.models.shape import MAX_SIZE as MAX_SIZE
from moetuner.evaluation.models.shape import ModelShape as ModelShape
from moetuner.evaluation.models.value_type import ValueType as ValueType
