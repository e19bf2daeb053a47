"""Every struct that crosses a channel, and nothing else.

Structs are frozen, tagged and `array_like`, so a frame is a short msgpack array. Columns of numbers
travel as the bytes of little-endian int32 (`ids`) or float32 arrays: one copy, no per-number cost.

    http ──Generate/Embed──> tokenizer ──Open──> detokenizer ── text, by mailboxes ──> http
                                │Admit/Abort        ^      │StopHit
                                v                   │Tokens v
                             scheduler ─────────────┘<──────┘
                                │ ^                 ──Stats/Answer/Fatal──> http
              StepPlan/Ask/Reset│ │StepDone, Answer, WorkerReady, WorkerLost, …
                                v │
                             executor <──frames──> worker, one a rank

A long text goes from the tokenizer, and from http, to a text process (TextWork; Prepared, Tokenized, Detokenized).
An image or a video goes from the tokenizer to a process that decodes it (DecodeMedia, MediaReady).
A request may need things on the device, such as a grammar. They go from the scheduler to their maker (Make, Made), then
to the worker (Load, Loaded), and then the request runs. Where there are tiers below the device, pages of its prompt may
have to come up first (Move, Moved). The maker of grammars asks its process (Compile, Compiled).
A question (Flush, Pause, FollowCache, Look, ListSessions, EndSession, or an Ask, which the worker answers) goes from
http to the scheduler and comes back as the Answer of its number. Where there are several front processes, a hub stands
between them and the scheduler, and carries what they ask each other (PeerAsk, PeerAnswer, PeerAnswers).
"""

from engine.messages.assets import Drop, Load, Loaded, Made, Make
from engine.messages.cache import FollowCache
from engine.messages.control import (
    Agreed,
    Answer,
    Ask,
    Beat,
    Boot,
    Fatal,
    Flush,
    Pause,
    Ping,
    Pong,
    Preload,
    Proposed,
    Reset,
    Retired,
    Stats,
    WorkerLost,
    WorkerReady,
    WorkerSilent,
)
from engine.messages.decoding import DecodeMedia, MediaBoot, MediaReady
from engine.messages.fronts import (
    Drain,
    Drained,
    FrontBoot,
    FrontLost,
    Listening,
    PeerAnswer,
    PeerAnswers,
    PeerAsk,
    Refused,
)
from engine.messages.looking import Look
from engine.messages.nodes import Attach, Bye, EndRanks, Join, RankEnded, StartRanks, TurnedAway, Welcome
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort, Admit, EndPrograms, Job, Open, StopHit
from engine.messages.sessions import EndSession, ListSessions
from engine.messages.step import StepDone, StepPlan
from engine.messages.text import TextAnswer, TextBoot, TextWork
from engine.messages.tiers import Move, Moved

ToTextProcess = TextBoot | TextWork
FromTextProcess = TextAnswer | Failed | Retired | Fatal
ToMediaProcess = MediaBoot | DecodeMedia
FromMediaProcess = MediaReady | Failed | Retired | Fatal
ToTokenizer = Job | Abort | WorkerReady
ToWorker = Boot | Preload | Agreed | StepPlan | Load | Drop | Move | Ask | Ping
FromWorker = Proposed | WorkerReady | StepDone | Loaded | Moved | Answer | Pong | Beat | Fatal
FromFront = Admit | Abort | StopHit | EndPrograms | Flush | Pause | Ask | FollowCache | Look | ListSessions | EndSession
FromExecutor = StepDone | Loaded | Moved | Answer | WorkerReady | WorkerLost | WorkerSilent | Fatal
ToScheduler = FromFront | FrontLost | FromExecutor | Made
ToExecutor = StepPlan | Load | Drop | Move | Ask | Reset
ToMaker = Make | WorkerReady
ToDetokenizer = Open | Tokens | Failed
ToFront = Tokens | Failed | Stats | Answer | WorkerReady | Fatal
ToHttp = Stats | Answer | WorkerReady | Fatal
ToFrontProcess = FrontBoot | ToFront | PeerAsk | PeerAnswers | Drain
FromFrontProcess = FromFront | PeerAsk | PeerAnswer | Listening | Drained | Refused
FromNode = Join | Attach | RankEnded | Ping  # node n → node 0
ToNode = Welcome | TurnedAway | StartRanks | EndRanks | Bye | Ping
