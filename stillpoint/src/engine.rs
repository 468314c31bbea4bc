//! Where a checkpoint's memory comes from: the tracker (our plugin inside QEMU), or QEMU's own migration stream.
//!
//! Both write the same checkpoints, so a lineage may change engines at any of them.

use clap::ValueEnum;
use qmp_bridge::migration::StreamMode;
use serde::{Deserialize, Serialize};

/// Which engine is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// The tracker where the plugin sits in QEMU, else the stream
    #[default]
    Auto,
    /// Changed pages, as the kernel saw them written
    Tracker,
    /// QEMU's own migration stream, compared with the last checkpoint
    Stream,
}

/// How the stream engine gets memory of one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StreamChoice {
    /// What this QEMU can do best
    #[default]
    Auto,
    /// Memory is write-protected in the pause and read while the guest runs on
    BackgroundSnapshot,
    /// Memory is read while the guest runs, and what changed meanwhile in the pause
    PreCopy,
}

/// What a checkpoint is taken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Tracker,
    Stream(StreamMode),
}

impl Engine {
    /// As results name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tracker => "tracker",
            Self::Stream(StreamMode::BackgroundSnapshot) => "background-snapshot",
            Self::Stream(StreamMode::PreCopy) => "pre-copy",
        }
    }
}
