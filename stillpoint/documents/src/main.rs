//! Writes the manual pages and shell completions of `stillpoint`, from the definition of its
//! command line: a program of its own, so that the one that is installed does not carry what is
//! needed once.

#![cfg_attr(not(test), deny(clippy::cast_possible_truncation))]

use clap::CommandFactory;
use clap_complete::{Shell, generate};
use std::path::Path;
use std::process::ExitCode;
use stillpoint_cli::cli::Cli;

const MANUAL: &str = "man/man1";

/// Where each shell looks for completions of installed programs, below `PREFIX/share`.
const COMPLETIONS: [(Shell, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", "stillpoint"),
    (Shell::Zsh, "zsh/site-functions", "_stillpoint"),
    (Shell::Fish, "fish/vendor_completions.d", "stillpoint.fish"),
];

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(directory), None) = (words.next(), words.next()) else {
        eprintln!("usage: stillpoint-documents SHARE (as in /usr/local/share)");
        return ExitCode::from(2);
    };
    match write(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillpoint-documents: {}: {error}", Path::new(&directory).display());
            ExitCode::FAILURE
        }
    }
}

fn write(share: &Path) -> std::io::Result<()> {
    let pages = share.join(MANUAL);
    std::fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(Cli::command(), &pages)?;
    for (shell, directory, name) in COMPLETIONS {
        let directory = share.join(directory);
        std::fs::create_dir_all(&directory)?;
        let mut file = std::fs::File::create(directory.join(name))?;
        generate(shell, &mut Cli::command(), "stillpoint", &mut file);
    }
    Ok(())
}
