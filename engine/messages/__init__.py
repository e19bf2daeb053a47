"""Every struct that crosses a channel, and nothing else.

Structs are frozen, tagged and `array_like`, so a frame is a short msgpack array. Columns of numbers
travel as the bytes of little-endian int32 (`ids`) or float32 arrays: one copy, no per-number cost.

    http ──Generate/Embed──> tokenizer ──Open──> detokenizer ──Chunks──> http
                                │Admit/Abort        ^      │StopHit
                                v                   │Tokens v
                             scheduler ─────────────┘<──────┘
                                │ ^                 ──Stats/Flushed/Paused/Profiled/ExpertCounts/Fatal──> http
   StepPlan/Profile/CountExperts/Reset│ │StepDone, Profiled, ExpertCounts, WorkerReady, WorkerLost, …
                                v │
                             executor <──frames──> worker, one a rank

A long text goes from the tokenizer, and from http, to a text process (TextWork; Prepared, Tokenized, Detokenized).
A grammar goes from the scheduler to the compiler (Compile, Compiled), then to the worker (LoadGrammar, GrammarLoaded),
and then its requests run.
"""

from engine.messages.assets import Compiled, DropGrammar, GrammarLoaded, LoadGrammar
from engine.messages.control import (
    Agreed,
    Boot,
    CountExperts,
    ExpertCounts,
    Fatal,
    Flush,
    Flushed,
    Pause,
    Paused,
    Ping,
    Pong,
    Preload,
    Profile,
    Profiled,
    Proposed,
    Reset,
    Stats,
    WorkerLost,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.reply import Chunks, Failed, Tokens
from engine.messages.request import Abort, Admit, Job, Open, StopHit
from engine.messages.step import StepDone, StepPlan
from engine.messages.text import Retired, TextAnswer, TextBoot, TextWork

ToTextProcess = TextBoot | TextWork
FromTextProcess = TextAnswer | Failed | Retired | Fatal
ToTokenizer = Job | Abort | WorkerReady
ToTheDevice = Profile | CountExperts  # questions of http's that the worker answers
FromTheDevice = Profiled | ExpertCounts
ToWorker = Boot | Preload | Agreed | StepPlan | LoadGrammar | DropGrammar | ToTheDevice | Ping
FromWorker = Proposed | WorkerReady | StepDone | GrammarLoaded | FromTheDevice | Pong | Fatal
FromFront = Admit | Abort | StopHit | Flush | Pause | ToTheDevice
FromExecutor = StepDone | GrammarLoaded | FromTheDevice | WorkerReady | WorkerLost | WorkerSilent | Fatal
ToScheduler = FromFront | FromExecutor | Compiled
ToExecutor = StepPlan | LoadGrammar | DropGrammar | ToTheDevice | Reset
ToDetokenizer = Open | Tokens | Failed
ToFront = Tokens | Failed | Stats | Flushed | Paused | FromTheDevice | WorkerReady | Fatal
ToHttp = Chunks | Failed | Stats | Flushed | Paused | FromTheDevice | WorkerReady | Fatal
