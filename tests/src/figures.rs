//! What a benchmark prints: a line for each series of samples.

/// The middle one; of an even number the mean of the two in the middle.
pub fn median(samples: &[f64]) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 {
        samples[middle]
    } else {
        f64::midpoint(samples[middle - 1], samples[middle])
    }
}

/// The line above the rows.
pub fn heading(what: &str) {
    println!("{what:52} {:>9} {:>9} {:>9}", "min", "median", "max");
}

/// Prints a series, and returns its median.
pub fn row(what: &str, samples: &[f64]) -> f64 {
    let least = samples.iter().copied().fold(f64::MAX, f64::min);
    let most = samples.iter().copied().fold(0.0, f64::max);
    let middle = median(samples);
    println!("{what:52} {least:>9.2} {middle:>9.2} {most:>9.2}");
    middle
}
