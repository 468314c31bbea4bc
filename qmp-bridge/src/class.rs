//! The class of each error of this crate.

use error_class::classes;

use crate::capture::{BadTag, CaptureError};
use crate::device_state::DeviceStateError;
use crate::disks::DiskError;
use crate::guest_agent::AgentError;
use crate::host_finder::HostError;
use crate::images::ImageError;
use crate::jobs::JobError;
use crate::migration::MigrationError;
use crate::nbd::NbdError;
use crate::nbd::server::ExportError;
use crate::nbd_server::ServerError;
use crate::paused::PauseError;
use crate::qmp::QmpError;
use crate::qmp::line::LineError;
use crate::ramblock::RamBlockError;
use crate::run_state::{NoGuest, RunStateError};
use crate::stream::StreamError;
use crate::stream_reader::StreamReadError;
use crate::synthetic_qcow2::SyntheticError;

classes! {
    QmpError: Refused(NoGreeting, NotQmp)
        Failed(Connect, NoMonitor, Encode, Timeout, Closed, Refused, Reply, Unexpected);
    LineError = Failed;
    AgentError = Failed;
    JobError: (Qmp) Failed(Failed, Stuck);
    ServerError: (Qmp) Refused(InUse) Failed(Socket);
    NbdError = Failed;
    ExportError = Failed;
    SyntheticError: Refused(TooLarge) Failed(LongBacking);

    DiskError: (Qmp) Refused(Unsupported, Inconsistent, Job);
    CaptureError: (Qmp, Nbd, Job, Server, OtherCheckpoint)
        Refused(Arriving, Unrecorded, NotAlone)
        Failed(Fleecing, Busy, Path, Broken, SlowFlush, Hung, FleecingFull);
    BadTag = Failed;
    ImageError: (Qmp, Nbd, Job) {Open, Silent} Failed(Start, Create, Path, Exit);

    NoGuest = Refused;
    RunStateError: (Qmp, NoGuest);
    PauseError: (Qmp, NoGuest) Failed(Disturbed, TooLong);
    RamBlockError: (Qmp) Refused(Empty) Failed(Line, TooMany);
    HostError = Failed;

    MigrationError: (Qmp, Pause, Export, Server) {Setup, Start}
        Refused(Busy, Missing, Unsupported, MigratedSince)
        Failed(Failed, Stuck, TooFast, PauseTooLong, Socket, Journal, BadJournal, Order, Activate,
            SourceEnded, DestinationEnded, NotWaiting, Send, Load, State, Path);
    StreamReadError: Refused(Unsupported, NoDescription)
        Failed(Io, CutOff, NotUnderstood, Malformed, TooLarge, Description, GivenUp);

    StreamError = Failed;
    DeviceStateError: (Save) Failed(Read, TooLarge, Malformed);
}
