"""The page's words, in English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..errors import I2VError, is_out_of_memory
from ..settings.stages import Setting

#: By key: English, Chinese.
WORDS: dict[str, tuple[str, str]] = {
    "title": ("From a picture to a video", "图生视频"),
    "heading": ("# From a picture to a video", "# 图生视频"),
    "from_picture": ("From a picture", "从图片"),
    "from_video": ("From a video", "从视频"),
    "from_file": ("How it was made", "生成信息"),
    "picture": ("Picture", "图片"),
    "examples": ("Examples", "示例"),
    "seeds": ("Seeds to try", "尝试的种子数"),
    "first_seed": ("First seed (empty: random)", "起始种子（留空则随机）"),
    "try": ("Try seeds", "尝试种子"),
    "choose": ("Choose", "选择"),
    "advanced": ("Advanced settings", "高级设置"),
    "advanced_second": ("Advanced settings of stage two", "第二阶段高级设置"),
    "refine": ("Refine", "精修"),
    "before": ("Before", "处理前"),
    "after": ("After", "处理后"),
    "video": ("Video", "视频"),
    "enhance": ("Enhance", "增强"),
    "made_video": ("A video of this studio", "本工作室生成的视频"),
    "its_picture": ("The picture it was made from", "生成它的图片"),
    "make_again": ("Make again", "重新生成"),
    "cancel": ("Cancel", "取消"),
    "download": ("Download", "下载"),
    "record": ("How it was made", "生成信息"),
    "no_second": (
        "This studio has a model for stage one only: --refine-model gives it one for stage two.",
        "本工作室只有第一阶段的模型；可用 --refine-model 指定第二阶段的模型。",
    ),
    # What the status says.
    "ahead": ("{} before you in the queue", "前面还有 {} 个任务"),
    "waiting": ("waiting", "等待中"),
    "starting": ("starting", "开始"),
    "loading": ("loading the model", "加载模型"),
    "reading": ("reading", "读取"),
    "clip": ("looking at the input", "理解输入"),
    "encoding": ("encoding", "编码"),
    "compiling": ("compiling", "编译"),
    "denoising": ("denoising", "去噪"),
    "decoding": ("decoding", "解码"),
    "writing": ("writing", "写入文件"),
    "of_videos": ("video {} of {}", "第 {}/{} 个视频"),
    "step": ("step {} of {}", "第 {}/{} 步"),
    "left": ("{} s left", "剩余约 {} 秒"),
    "minutes_left": ("{} min left", "剩余约 {} 分钟"),
    "done": ("Done in {} s.", "完成，用时 {} 秒。"),
    "cancelled": ("Cancelled.", "已取消。"),
    "busy": ("This page has work already: wait for it, or cancel it.", "本页面已有任务：请等待或取消。"),
    "full": ("All places in the queue are taken: try again later.", "队列已满，请稍后再试。"),
    "need_picture": ("Give a picture first.", "请先提供图片。"),
    "need_video": ("Give a video first.", "请先提供视频。"),
    "need_chosen": ("Try seeds and choose a video first.", "请先尝试种子并选择一个视频。"),
    "need_made_video": ("Give a video of this studio first.", "请先提供本工作室生成的视频。"),
    "no_record": (
        "The video says nothing of how it was made: it is not one of this studio.",
        "该视频没有生成信息：不是本工作室生成的。",
    ),
    "adapters": (
        "It was made with LoRA adapters, which a file cannot name here.",
        "该视频使用了 LoRA，无法在此由文件指定。",
    ),
    "out_of_memory": (
        "The memory is not enough: fewer frames or a smaller size take less.",
        "内存不足：请减少帧数或尺寸。",
    ),
    "unexpected": (
        "Something went wrong that was not foreseen; the server's log says what.",
        "发生意外错误，详情见服务器日志。",
    ),
    "error": ("It cannot be done: {}", "无法完成：{}"),
}

#: Labels and help of the settings, by their names; English ones are their declarations'.
_SETTINGS_IN_CHINESE: dict[str, tuple[str, str]] = {
    "steps": ("步数", "去噪步数；默认为求解器自己的步数"),
    "target_fps": ("帧率", "每秒帧数；第二阶段可填 source，即沿用原视频"),
    "max_frames": ("帧数", "第一阶段：视频帧数；第二阶段：每次通过网络的帧数"),
    "resolution": ("尺寸", "视频尺寸（像素），如 448x256"),
    "guide_scale": ("引导强度", "对图片或文字的遵循程度"),
    "guidance_interval": ("引导区间", "近似：只在这些时间步引导，如 200-800"),
    "reuse_interval": ("特征复用间隔", "近似：每 N 次调用计算一次深层特征"),
    "chunk_size": ("窗口帧数", "长视频每个窗口的帧数"),
    "overlap_size": ("窗口重叠帧数", "相邻窗口共享的帧数；默认四分之一"),
    "noise_strength": ("噪声偏移强度", "偏移噪声的强度"),
    "solver": ("求解器", "近似：dpmpp 即 DPM-Solver++(2M)，步数减半"),
    "guide_rescale": ("引导重缩放", "引导在多大程度上保持无引导预测的对比度"),
    "total_noise_levels": ("强度", "加到视频上的噪声，最大 1000"),
    "solver_mode": ("求解模式", "30 步 DPM-Solver++(2M) SDE，或 50 步 Heun"),
    "text": ("文字", "视频内容，英文"),
    "positive_prompt": ("正向提示词", "加在每段文字之后"),
    "negative_prompt": ("负向提示词", "要避免的内容"),
    "scale": ("放大倍数", "相对原视频的尺寸倍数"),
    "scene_cuts": ("按场景处理", "每个场景单独生成"),
    "tile_size": ("分块边长", "大画面分块通过网络时的边长（像素）"),
    "tile_overlap": ("分块重叠", "相邻分块共享的像素；默认四分之一"),
    "colour": ("颜色", "source：保持原视频的低频颜色"),
    "keep_audio": ("保留声音", "保留原视频的声音"),
    "crf": ("码率因子", "编码器的 CRF：越小越好，文件越大"),
}
_SETTINGS_IN_ENGLISH = {"total_noise_levels": "strength", "target_fps": "frames per second"}

ENGLISH, CHINESE = range(2)


def language_of(accepted: str | None) -> int:
    """Return the column of ``WORDS`` for a browser's ``Accept-Language``."""
    return CHINESE if (accepted or "").strip().lower().startswith("zh") else ENGLISH


def words(key: str, language: int, *values: object) -> str:
    """Return a text of ``WORDS`` with values put in."""
    return WORDS[key][language].format(*values)


def setting_words(setting: Setting, language: int) -> tuple[str, str]:
    """Return a setting's label and help."""
    if language == CHINESE:
        return _SETTINGS_IN_CHINESE[setting.name]
    label = _SETTINGS_IN_ENGLISH.get(setting.name) or (setting.keyword or setting.name).replace("_", " ")
    return label.capitalize(), setting.help


def translations(settings: list[Setting]) -> dict[str, dict[str, str]]:
    """Return all texts by language and key, as ``gradio.I18n`` takes them; a setting's are two."""
    languages: dict[str, dict[str, str]] = {}
    for name, language in (("en", ENGLISH), ("zh", CHINESE), ("zh-CN", CHINESE), ("zh-TW", CHINESE)):
        texts = {key: texts[language] for key, texts in WORDS.items()}
        for each in settings:
            texts[f"{each.name}_label"], texts[f"{each.name}_help"] = setting_words(each, language)
        languages[name] = texts
    return languages


#: What begins like an absolute path, up to its last part; in quotes it may have blanks.
_FOLDERS = re.compile(
    r"(?<=['\"])(?:[A-Za-z]:)?[/\\][^'\"]*[/\\]"
    r"|(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\:,;]+[/\\])+"
)


def error_words(error: BaseException, language: int, report: Callable[[BaseException], None]) -> str:
    """Return what a page says of an error: never a path of the server, nor a traceback.

    ``report`` is called with errors that are nobody's fault but ours.
    """
    if is_out_of_memory(error) and not isinstance(error, I2VError):
        return words("out_of_memory", language)
    if not isinstance(error, I2VError):
        report(error)
        return words("unexpected", language)
    if str(error) in WORDS:
        return words(str(error), language)
    return words("error", language, without_folders(str(error)))


def without_folders(text: str) -> str:
    """Return a text whose absolute paths are cut to their last parts."""
    return _FOLDERS.sub("", text)
