"""Which task a model class is for: its Auto class, and its pipeline tag on the Hub."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto import modeling_auto


__all__ = ["PIPELINE_TAGS", "Task", "task_of_class", "task_of_peft"]


@dataclass(frozen=True)
class Task:
    """How transformers loads it, and what the Hub calls it (empty where that depends on the model)."""

    auto_class: str = ""
    pipeline_tag: str = ""


_ROWS = (  # names of transformers' mappings; a class belongs to the first that has it
    ("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
    ("MASKED_LM", "AutoModelForMaskedLM", "fill-mask"),
    ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", "text-classification"),
    ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "token-classification"),
    ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering", "question-answering"),
    ("MULTIPLE_CHOICE", "AutoModelForMultipleChoice", "multiple-choice"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", ""),
    ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image-classification"),
    ("SEMANTIC_SEGMENTATION", "AutoModelForSemanticSegmentation", "image-segmentation"),
    ("OBJECT_DETECTION", "AutoModelForObjectDetection", "object-detection"),
    ("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", "audio-classification"),
    ("CTC", "AutoModelForCTC", "automatic-speech-recognition"),
    ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText", "image-text-to-text"),
)
_PEFT = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
}
PIPELINE_TAGS = frozenset(
    """text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation text2text-generation fill-mask sentence-similarity
    text-to-speech text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    image-text-to-image image-text-to-video visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text video-to-video keypoint-detection visual-document-retrieval any-to-any
    other""".split()
)


def task_of_class(name: str) -> Task:
    """The task of a model class, such as `"BertForSequenceClassification"`."""
    for key, auto_class, tag in _ROWS:
        known = getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES").values()
        if any(name == one or (isinstance(one, tuple) and name in one) for one in known):
            return Task(auto_class, tag)
    return Task()


def task_of_peft(task_type: str | None) -> Task:
    """The task of PEFT's `task_type`."""
    return next((Task(auto, tag) for key, auto, tag in _ROWS if key == _PEFT.get(str(task_type))), Task())
