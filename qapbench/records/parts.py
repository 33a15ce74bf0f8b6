"""The parts of the record of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from qapbench.receipt import ReceiptFields

Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Part(BaseModel):
    """Base of the parts of a record. They are frozen, and ignore fields that this version does not know."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)


class ColumnScore(Part):
    """One column of the task's table.

    Attributes:
        name: name of the column.
        k: number of right answers, if each question is right or wrong.
        n: number of questions.
        accuracy: k / n.
        stderr: its standard error, or that of `mean`.
        low: lower end of Wilson's 95 % interval of the accuracy.
        high: upper end of that interval.
        mean: mean of a metric that is not right or wrong.
        figure: the task's own figure over all questions, such as an F1 score, where it is no mean over them.
        lower: whether a lower value is better; None if a higher one is.
        unavailable: why there is no value.
    """

    name: Annotated[str, Field(min_length=1)]
    k: Count | None = None
    n: Count | None = None
    accuracy: FiniteFloat | None = None
    stderr: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    mean: FiniteFloat | None = None
    figure: FiniteFloat | None = None
    lower: Literal[True] | None = None
    unavailable: str | None = None

    @property
    def value(self) -> float | None:
        """The accuracy, the mean or the figure, whichever the column has; None if it has none."""
        return next((value for value in (self.accuracy, self.mean, self.figure) if value is not None), None)

    @model_validator(mode="after")
    def _counts(self) -> ColumnScore:
        if self.k is not None and self.n is not None and self.k > self.n:
            raise ValueError(f"{self.k} right answers of {self.n} questions")
        return self


class Unparsed(Part):
    """Answers that no rule of the parser could read.

    Attributes:
        k: number of answers that could not be read.
        n: number of questions.
        rate: k / n, or 0 if there are no questions.
    """

    k: Count
    n: Count
    rate: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _counts(self) -> Unparsed:
        if self.k > self.n:
            raise ValueError(f"{self.k} unreadable answers of {self.n} questions")
        return self


class Confidence(Part):
    """How far the probabilities of the options can be relied on, where a task compares likelihoods.

    A probability is the option's share: the softmax of the log-likelihoods over the options of the question.

    Attributes:
        ece: expected calibration error of the most likely option (Guo et al., ICML 2017): the mean over 15 bins of
            confidence of |accuracy - confidence|, weighted by the questions in each.
        brier: Brier's score (1950): the mean over questions of the sum over options of (probability - 1 if it is the
            right one, else 0) squared, between 0 and 2.
        n: number of questions with one right option.
    """

    ece: FiniteFloat
    brier: FiniteFloat
    n: Count


class ScoreTable(Part):
    """The scores of a run.

    Attributes:
        columns: the columns in the order of the task's table; the last one is the overall accuracy, unless the task
            names another as its score.
        unparsed: answers that the parser could not read.
        missing: number of questions without a stored output, which count as wrong.
        unknown: number of stored outputs for questions that are not in the data.
        confidence: how reliable the probabilities of the options are; None where there are none.
    """

    columns: list[ColumnScore]
    unparsed: Unparsed
    missing: Count = 0
    unknown: Count = 0
    confidence: Confidence | None = None

    def column(self, name: str) -> ColumnScore | None:
        """The column with that name; None if there is none."""
        return next((column for column in self.columns if column.name == name), None)


class TaskRecord(Part):
    """The task of a run.

    Attributes:
        name: name of the task.
        questions: number of questions that were answered.
        chance: expected accuracy of guessing; None if it is not known.
        score: name of the column that is the task's score; None for the last one.
    """

    name: str
    questions: Count
    chance: FiniteFloat | None = None
    score: str | None = None


class TaskPart(Part):
    """The result of one task of a run that asked several. It is that of an ordinary run, which lies beside this one.

    Attributes:
        label: the task's name, with a number if the run asked it several times with other options.
        run_id: id of the run of this task alone.
        task: the task.
        data: hash of its data.
        scores: its scores.
        tokens: measured token counts; None if no question has an image.
        stopped: why it was stopped; None if it answered all questions.
    """

    label: str
    run_id: str
    task: TaskRecord
    data: str = ""
    scores: ScoreTable
    tokens: TokenCounts | None = None
    stopped: Stopped | None = None


class TokenCounts(Part):
    """Visual tokens per image, as measured. All but `images` are means over images, or a minimum or maximum.

    Attributes:
        images: number of images.
        available: tokens before pruning.
        mean: tokens that the language model received, kept and merged ones together. Of tokens that are dropped between
            layers, those that the last layer received, or `layer_mean` if it received none.
        min: smallest number of them for an image.
        max: largest number of them for an image.
        kept: the kept part of `mean`.
        merged: the merged part of `mean`.
        layer_mean: mean over the decoder's layers, if tokens are dropped between layers.
        separators: tokens that the model adds itself, such as new lines between rows of tiles; not in the budget.
    """

    images: Count | None = None
    available: FiniteFloat
    mean: FiniteFloat
    min: FiniteFloat
    max: FiniteFloat
    kept: FiniteFloat
    merged: FiniteFloat
    layer_mean: FiniteFloat | None = None
    separators: FiniteFloat | None = None


class ReceiptRecord(ReceiptFields):
    """A receipt, as it is stored.

    Attributes:
        summary: the receipt in one line.
    """

    model_config = ConfigDict(frozen=True)

    summary: str


class Environment(BaseModel):
    """The machine and the settings that made a result.

    Versions of packages are further fields, named like the packages.

    Attributes:
        python: version of Python.
        platform: operating system and machine.
        device: name of the GPU or CPU.
        threads: number of torch's threads.
        git: commit of the checkout that ran, followed by "(dirty)" if it was changed; None for an installed wheel.
        batch_size: number of questions answered together.
        workers: number of processes that shared the questions.
        engine: where the workers ran.
        dtype: dtype of the model's weights.
        image_processor: class of the image processor.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    python: str | None = None
    platform: str | None = None
    device: str | None = None
    threads: int | None = None
    git: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    engine: str | None = None
    dtype: str | None = None
    image_processor: str | None = None


class Timing(Part):
    """Cost of the session that finished the run. It is not part of the run's identity, and differs each time.

    Attributes:
        seconds: this run's share of the time spent.
        questions: number of questions answered in that session.
        computed: how many of them were computed for this run, not taken over from another run.
        questions_per_second: `questions` / `seconds`.
        stages: `seconds` by stage.
        peak_memory_mb: peak resident memory of a process that answered.
        peak_gpu_memory_mb: its peak GPU memory; None without a GPU.
        memory_mb: peak resident memory of such a process while it loaded ("load"), quantized and calibrated
            ("quantize") and answered ("answer"); empty in records of earlier versions. Only Linux sets its mark back
            between two phases; elsewhere the peak of a phase is that of the process so far.
        gpu_memory_mb: the same of GPU memory.
    """

    seconds: FiniteFloat
    questions: Count = 0
    computed: Count = 0
    questions_per_second: FiniteFloat = 0.0
    stages: dict[str, FiniteFloat] = Field(default_factory=dict)
    peak_memory_mb: Count | None = None
    peak_gpu_memory_mb: Count | None = None
    memory_mb: dict[str, Count] = Field(default_factory=dict)
    gpu_memory_mb: dict[str, Count] = Field(default_factory=dict)


class Stopped(Part):
    """Why a run was stopped before its last question (`--fast`).

    Attributes:
        by: name of the run that was better.
        lost: number of questions that only that run answered right.
        won: number of questions that only this run answered right.
        p: p-value of the one-sided exact McNemar test.
        level: the threshold that p had to fall below.
        asked: number of questions that this run answered.
        of: number of questions of the task.
        bound: all of this as a sentence.
    """

    by: str
    lost: Count
    won: Count
    p: FiniteFloat
    level: FiniteFloat
    asked: Count
    of: Count
    bound: str


class StageCost(Part):
    """A number for each stage of one prompt, such as FLOPs; see `qapbench.costing.amounts.StageNumbers`.

    Attributes:
        tower: the vision tower.
        projector: the projector.
        selection: choosing the tokens.
        prefill: the language model on the prompt.
        decode: the language model on the token after it.
    """

    tower: FiniteFloat
    projector: FiniteFloat
    selection: FiniteFloat
    prefill: FiniteFloat
    decode: FiniteFloat

    @property
    def prompt(self) -> float:
        """All stages up to the first token of the answer."""
        return self.tower + self.projector + self.selection + self.prefill


class BudgetUse(Part):
    """A budget that a spec gives as a cost, and what became of it.

    Attributes:
        cost: which cost it is: layer_mean, flops or kv_bytes.
        asked: its value.
        keep: the number of tokens that the method was given for it.
        reached: what the run has, by the tokens that were measured.
    """

    cost: str
    asked: FiniteFloat
    keep: Count
    reached: FiniteFloat


class CostRecord(Part):
    """What one prompt of a run costs, by its model's config and what was measured; docs/cost.md has the definitions.

    Attributes:
        text: text tokens of the prompt, which are the same for every run.
        image: height and width in pixels of its image; None if no question has one.
        available: visual tokens per image before pruning, as measured.
        layer_mean: mean over the decoder's layers of those that they received, as measured.
        tokens_share: visual tokens x layers relative to those without pruning.
        flops: FLOPs of each stage.
        bops: FLOPs x bits x bits / 256 of each stage.
        flops_share: FLOPs of the prompt relative to the same model with nothing compressed.
        weight_bytes: bytes of the weights as they are stored.
        kv_bytes: bytes of the KV cache that the prompt leaves.
        activation_bytes: bytes of activations that are held at the same time at most.
        budget: what became of a budget that the spec gives as a cost; None if it gives a number of tokens.
    """

    text: Count
    image: tuple[int, int] | None = None
    available: FiniteFloat
    layer_mean: FiniteFloat
    tokens_share: FiniteFloat
    flops: StageCost
    bops: StageCost
    flops_share: FiniteFloat
    weight_bytes: Count
    kv_bytes: FiniteFloat
    activation_bytes: FiniteFloat
    budget: BudgetUse | None = None


class Unanswered(Part):
    """A question that could not be asked.

    Attributes:
        id: the question's id in the data.
        doc: number of the document.
        why: what the model's processor refuses of its pictures.
    """

    id: str
    doc: Count
    why: str
