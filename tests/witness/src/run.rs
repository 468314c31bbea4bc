//! The witness at work: ticks, each a step (unless idle) and a slice of checks.

use crate::base::Base;
use crate::config::Config;
use crate::disk::Disk;
use crate::journal::{History, Journal, JournalFlaw, Shape};
use crate::page::mix;
use crate::report::{self, Part, Report};
use crate::table::{Table, TableFlaw};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Behind by more than this, a tick is dropped instead of made up for: a burst would hide what
/// `rate` asks for.
const TOLERATED_LAG: Duration = Duration::from_millis(500);

pub(crate) struct Witness {
    config: Config,
    run: u64,
    table: Table,
    history: History,
    journals: Vec<Journal<Disk>>,
    base: Option<Base<Disk>>,
    report: Report,
    late: u64,
}

impl Witness {
    /// Opens the disks, fills the table (step 0) and writes record 0 to each journal, unless idle.
    pub(crate) fn prepare(config: Config) -> Result<Self, String> {
        let run = random_run();
        let table = Table::new(run, (config.table_mib << 8) as usize);
        let (journals, shapes) = open_journals(&config)?;
        let slots = shapes.iter().map(|shape| shape.slots).max().unwrap_or(1);
        let history = History::new(run, slots, table.digest());
        let base = config.base.as_deref().map(open_base).transpose()?;
        let report = Report::default();
        let mut witness = Witness { config, run, table, history, journals, base, report, late: 0 };
        witness.announce(&shapes);
        if !witness.config.is_idle() {
            witness.append();
        }
        Ok(witness)
    }

    fn announce(&self, shapes: &[Shape]) {
        let config = &self.config;
        let slots: Vec<String> = shapes.iter().map(|shape| shape.slots.to_string()).collect();
        let slots = if slots.is_empty() { "-".to_owned() } else { slots.join(",") };
        report::line(&format!(
            "WITNESS start run={:016x} table_mib={} rate={} steps={} check={} journals={} slots={slots} cached={} base={} uptime={}",
            self.run,
            config.table_mib,
            config.rate,
            config.steps,
            config.check(),
            list(config.journals.iter().map(|path| path.display().to_string())),
            self.journals.iter().filter(|journal| !journal.medium().is_direct()).count(),
            list(config.base.iter().map(|path| path.display().to_string())),
            report::uptime(),
        ));
    }

    /// Runs for ever.
    pub(crate) fn run(mut self) -> ! {
        let tick = Duration::from_secs(1) / self.config.steps as u32;
        let report_every = Duration::from_millis(self.config.report_ms);
        let mut due = Instant::now();
        let mut spoken: Option<Instant> = None;
        loop {
            self.tick();
            if spoken.is_none_or(|at| at.elapsed() >= report_every) {
                spoken = Some(Instant::now());
                self.progress();
            }
            due = self.wait_for(due + tick);
        }
    }

    /// Sleeps until `due`; when that is long past, the schedule starts again from now.
    fn wait_for(&mut self, due: Instant) -> Instant {
        let now = Instant::now();
        if now > due + TOLERATED_LAG {
            self.late += 1;
            return now;
        }
        thread::sleep(due.saturating_duration_since(now));
        due
    }

    fn tick(&mut self) {
        self.check_disks();
        let mut flaws = Vec::new();
        if !self.config.is_idle() {
            self.step(&mut flaws);
        }
        self.table.check_next(self.config.checks_per_tick(), &mut flaws);
        let step = self.history.step();
        for flaw in flaws {
            self.report.contradiction(Part::Table, step, &flaw);
        }
    }

    /// RAM first, then each journal in order: what [`crate::journal`] promises rests on this.
    fn step(&mut self, flaws: &mut Vec<TableFlaw>) {
        let step = self.history.step() + 1;
        self.table.write_step(step, self.config.pages_in_step(step), flaws);
        self.history.advance(self.table.digest());
        self.append();
    }

    fn append(&mut self) {
        self.on_journals(Journal::append);
    }

    fn on_journals(&mut self, act: fn(&mut Journal<Disk>, &History, &mut Vec<JournalFlaw>)) {
        let step = self.history.step();
        for (journal, path) in self.journals.iter_mut().zip(&self.config.journals) {
            let mut flaws = Vec::new();
            act(journal, &self.history, &mut flaws);
            for flaw in flaws {
                self.report.contradiction(
                    Part::Journal,
                    step,
                    &format_args!("{}: {flaw}", path.display()),
                );
            }
        }
    }

    fn check_disks(&mut self) {
        if !self.config.is_idle() {
            self.on_journals(Journal::check);
        }
        if let Some(Err(flaw)) = self.base.as_mut().map(Base::check_one) {
            self.report.contradiction(Part::Base, self.history.step(), &flaw);
        }
    }

    fn progress(&self) {
        let disks = list(self.journals.iter().map(|journal| journal.last().to_string()));
        let (passes, late) = (self.table.passes(), self.late);
        let rest = format_args!("disks={disks} passes={passes} late={late}");
        report::line(&self.report.progress(self.history.step(), &rest));
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() { "-".to_owned() } else { items.join(",") }
}

fn open_journals(config: &Config) -> Result<(Vec<Journal<Disk>>, Vec<Shape>), String> {
    let wanted = config.journal_mib << 20;
    let mut journals = Vec::new();
    let mut shapes = Vec::new();
    for path in &config.journals {
        let opened = Disk::open_journal(path, wanted);
        let disk = opened.map_err(|error| format!("journal {}: {error}", path.display()))?;
        let shape =
            Shape::fitting(disk.bytes().min(wanted), config.journal_pages).ok_or_else(|| {
                format!("journal {}: {} bytes hold no two records", path.display(), disk.bytes())
            })?;
        journals.push(Journal::new(disk, shape));
        shapes.push(shape);
    }
    Ok((journals, shapes))
}

fn open_base(path: &Path) -> Result<Base<Disk>, String> {
    let opened = Disk::open_read_only(path).and_then(|disk| {
        let bytes = disk.bytes();
        Base::open(disk, bytes)
    });
    opened.map_err(|error| format!("base {}: {error}", path.display()))
}

/// Different for every boot, even where the guest's random pool is empty: two guests' pages must
/// never match.
fn random_run() -> u64 {
    let mut bytes = [0; 8];
    let read = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes));
    let clock =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let random = if read.is_ok() { u64::from_le_bytes(bytes) } else { 0 };
    mix(random ^ mix(clock))
}
