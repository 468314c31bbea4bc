//! Median and spread of a few dozen samples.

use serde::Serialize;

/// Nearest-rank percentiles, in the unit of the samples; the median of an even count is the mean of
/// the middle two.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The least sample.
    pub min: f64,
    /// As many samples are below it as above.
    pub median: f64,
    /// Nine of ten samples are at most this.
    pub p90: f64,
    /// The greatest sample.
    pub max: f64,
}

impl Spread {
    /// `None` without a sample.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self { min, median: median(&sorted)?, p90: nearest_rank(&sorted, 90)?, max })
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let (low, high) = (sorted.len().checked_sub(1)? / 2, sorted.len() / 2);
    Some((sorted.get(low)? + sorted.get(high)?) / 2.0)
}

fn nearest_rank(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn known_samples_give_known_figures() {
        let ten = Spread::of((1..=10).rev().map(f64::from)).unwrap();
        assert_eq!(ten, Spread { min: 1.0, median: 5.5, p90: 9.0, max: 10.0 });
        let three = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(three, Spread { min: 1.0, median: 2.0, p90: 3.0, max: 3.0 });
        assert_eq!(
            Spread::of([7.0]).unwrap(),
            Spread { min: 7.0, median: 7.0, p90: 7.0, max: 7.0 }
        );
        assert_eq!(Spread::of([]), None);
    }

    /// By the definition: at most a tenth of the samples is above, and fewer are not.
    #[test]
    fn ninetieth_percentile_is_the_nearest_rank_of_any_count() {
        for count in 1..=200_u32 {
            let samples: Vec<f64> = (1..=count).map(f64::from).collect();
            let spread = Spread::of(samples.iter().rev().copied()).unwrap();
            let above = |limit: f64| samples.iter().filter(|sample| **sample > limit).count() * 10;
            assert!(above(spread.p90) <= samples.len(), "{count}");
            assert!(above(spread.p90 - 1.0) > samples.len(), "{count}");
            assert_eq!((spread.min, spread.max), (1.0, f64::from(count)));
            assert_eq!(spread.median, f64::from(count + 1) / 2.0);
        }
    }
}
