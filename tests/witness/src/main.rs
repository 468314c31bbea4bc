//! The workload of test guests: a program that would notice a wrong restore.
//!
//! It keeps a table in RAM and a journal on one or more disks. Every step N rewrites some pages of
//! the table and appends record N, which carries a digest of the table, to every journal. All the
//! time it checks the table against what a deterministic generator says, the journal against RAM,
//! and the base image below the disks against its own generator. It keeps no other state: a
//! restored VM continues with the very next step, and a page of RAM or a block of disk from any
//! other instant is a `WITNESS CONTRADICTION`.
//!
//! The claim about RAM and disk is stated in [`journal`]: at every instant a journal's last record
//! is RAM's step, or the step before it while a write is under way; between steps, when it is
//! checked, it is exactly RAM's step.
//!
//! `witness [key=value …]` runs; `witness make-base FILE MIB` writes a base image.

mod base;
mod config;
mod disk;
mod journal;
mod page;
mod report;
mod run;
mod table;

use config::Config;
use std::io::{self, BufWriter};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["make-base", file, mib] => make_base(file, mib),
        _ => witness(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            report::line(&format!("WITNESS REFUSED {text}"));
            ExitCode::from(2)
        }
    }
}

fn make_base(file: &str, mib: &str) -> Result<(), String> {
    let mib: u64 = mib.parse().map_err(|_| format!("make-base: {mib:?} is not a number of MiB"))?;
    let pages = mib.saturating_mul(256);
    let written = std::fs::File::create(file).and_then(|out| write_base(out, pages));
    written.map_err(|error| format!("make-base {file}: {error}"))
}

fn write_base(out: std::fs::File, pages: u64) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, out);
    base::write_image(&mut out, pages)?;
    out.get_ref().sync_all()
}

fn witness(arguments: &[String]) -> Result<(), String> {
    let kernel = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let config = Config::parse(&kernel, arguments)?;
    run::Witness::prepare(config)?.run()
}
