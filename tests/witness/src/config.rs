//! What the witness is asked to do: `key=value` words from its arguments, or `witness.key=value`
//! words from the kernel's command line (arguments win).

use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Size of the table in RAM.
    pub table_mib: u64,
    /// Table pages rewritten per second; 0 is the idle mode: no steps, nothing written, everything
    /// still checked.
    pub rate: u64,
    /// Steps, that is journal records, per second.
    pub steps: u64,
    /// Table pages checked per second (default: 4096, when idle 1024). A whole table is
    /// `table_mib * 256` pages.
    pub check: Option<u64>,
    /// Between two lines on the console.
    pub report_ms: u64,
    pub journals: Vec<PathBuf>,
    /// Part of each journal disk that is used.
    pub journal_mib: u64,
    /// Pages of 4 KiB written per step and journal.
    pub journal_pages: u64,
    /// A disk whose base image is checked, one page per tick.
    pub base: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            table_mib: 32,
            rate: 200,
            steps: 10,
            check: None,
            report_ms: 1000,
            journals: Vec::new(),
            journal_mib: 4,
            journal_pages: 1,
            base: None,
        }
    }
}

/// Prefix of our words on the kernel's command line.
const PREFIX: &str = "witness.";

impl Config {
    /// `kernel`: the text of /proc/cmdline; words without our prefix are not ours.
    pub(crate) fn parse(kernel: &str, arguments: &[String]) -> Result<Self, String> {
        let mut config = Config::default();
        let words = kernel.split_whitespace().filter_map(|word| word.strip_prefix(PREFIX));
        for word in words.chain(arguments.iter().map(String::as_str)) {
            config.apply(word)?;
        }
        config.validated()
    }

    fn apply(&mut self, word: &str) -> Result<(), String> {
        let (key, value) =
            word.split_once('=').ok_or_else(|| format!("{word:?}: expected key=value"))?;
        match key {
            "table_mib" => self.table_mib = number(key, value, 1..=1 << 20)?,
            "rate" => self.rate = number(key, value, 0..=10_000_000)?,
            "steps" => self.steps = number(key, value, 1..=1000)?,
            "check" => self.check = Some(number(key, value, 1..=10_000_000)?),
            "report_ms" => self.report_ms = number(key, value, 10..=60_000)?,
            "journal" => {
                self.journals =
                    value.split(',').filter(|path| !path.is_empty()).map(PathBuf::from).collect()
            }
            "journal_mib" => self.journal_mib = number(key, value, 1..=1 << 20)?,
            "journal_pages" => self.journal_pages = number(key, value, 1..=1024)?,
            "base" => self.base = (!value.is_empty()).then(|| PathBuf::from(value)),
            // The guest's init reads these itself.
            "root" | "ro" | "rw" => {}
            _ => {
                return Err(format!(
                    "{word:?}: no such key (table_mib, rate, steps, check, report_ms, journal, journal_mib, journal_pages, base)"
                ));
            }
        }
        Ok(())
    }

    fn validated(self) -> Result<Self, String> {
        let reserved_mib = (crate::base::RESERVED_PAGES * crate::page::PAGE_BYTES as u64) >> 20;
        let shared = self.base.as_ref().is_some_and(|base| self.journals.contains(base));
        if shared && self.journal_mib > reserved_mib {
            return Err(format!(
                "journal_mib={}: a journal on the base disk has {reserved_mib} MiB at most",
                self.journal_mib
            ));
        }
        Ok(self)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.rate == 0
    }

    /// Table pages that step `step` rewrites: `rate` over one second, spread evenly.
    pub(crate) fn pages_in_step(&self, step: u64) -> u64 {
        let turn = step % self.steps;
        (turn + 1) * self.rate / self.steps - turn * self.rate / self.steps
    }

    pub(crate) fn check(&self) -> u64 {
        self.check.unwrap_or(if self.is_idle() { 1024 } else { 4096 })
    }

    pub(crate) fn checks_per_tick(&self) -> u64 {
        self.check().div_ceil(self.steps)
    }
}

fn number(key: &str, value: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
    let parsed = value.parse().ok().filter(|number| range.contains(number));
    parsed.ok_or_else(|| {
        format!("{key}={value}: expected a number from {} to {}", range.start(), range.end())
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn parse(kernel: &str, arguments: &[&str]) -> Result<Config, String> {
        let arguments: Vec<String> = arguments.iter().map(|word| word.to_string()).collect();
        Config::parse(kernel, &arguments)
    }

    #[test]
    fn arguments_win_over_the_kernel_command_line() {
        let config =
            parse("quiet witness.rate=5 witness.journal=/dev/vda,/dev/vdb x=y", &["rate=7"])
                .expect("valid");
        assert_eq!(config.rate, 7);
        assert_eq!(config.journals, [PathBuf::from("/dev/vda"), PathBuf::from("/dev/vdb")]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse("witness.rat=5", &[]).is_err_and(|text| text.contains("rat=5")));
        assert!(parse("witness.rate=x", &[]).is_err_and(|text| text.contains("0 to")));
        assert!(parse("", &["rate"]).is_err_and(|text| text.contains("key=value")));
        assert!(parse("", &["base=/dev/vda", "journal=/dev/vda", "journal_mib=17"]).is_err());
    }

    #[test]
    fn the_rate_is_kept_over_a_second() {
        let config = parse("", &["rate=203", "steps=10"]).expect("valid");
        assert_eq!((1..=10).map(|step| config.pages_in_step(step)).sum::<u64>(), 203);
        assert!(parse("", &["rate=0"]).expect("valid").is_idle());
    }
}
