//! From a method and a ratio to a compression.

use firebrick_kernels::sketch::SparseError;

use super::{
    Code, Compression, CompressionSettings, Demo, NamedParameter, PipelineError, PowerSgd, RandomK,
    Sign, Sketch, Sparse, Vectors, failure, is_matrix,
};
use crate::config::{CompressionMethod, CompressionPlan};
use crate::readable::bytes;

/// A compression of the gradients of a model.
#[derive(Debug)]
pub struct Method {
    /// The exchange that it makes of a pipeline.
    pub compression: Compression,
    /// What a step is expected to send.
    pub reach: Reach,
}

/// The bytes that a worker is expected to send in a step, on average, if what it sends lies at
/// random places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reach {
    /// Bytes of everything that is sent.
    pub sent_bytes: f64,
    /// Bytes of the gradient in f32.
    pub gradient_bytes: f64,
}

impl Reach {
    /// Bytes of the gradient for each byte that is sent.
    pub fn ratio(&self) -> f64 {
        self.gradient_bytes / self.sent_bytes
    }
}

/// A ratio that a method does not reach with a model.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "method \"{method}\" does not reach a ratio of {ratio} with this model: it reaches {:.0} to {:.0}. \
     Change gradient.compression.ratio or method",
    reached[0],
    reached[1]
)]
pub struct RatioError {
    /// The method's name.
    pub method: &'static str,
    /// The ratio that was asked for.
    pub ratio: f64,
    /// The smallest and the largest that it reaches.
    pub reached: [f64; 2],
}

/// Above this ratio vectors would be most of what is sent.
const SELDOM_ABOVE: f64 = 100.0;

/// How vectors travel above that ratio.
const SELDOM: Vectors = Vectors::Seldom { every: 10 };

/// More trits than this share describe a Gaussian block worse (Max, 1960: the best quantiser of three
/// levels has its threshold at 0.61 sigma, beyond which 54 % lie).
const DENSEST_TRITS: f64 = 0.54;

/// How far beyond the payload that a ratio asks for the nearest possible one may be.
const TOLERANCE: f64 = 1.1;

impl Method {
    /// The compression of a plan, for a model with these trained parameters and so many logical
    /// workers.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] for a ratio that the method does not reach with this model; it says
    /// which ratios it reaches.
    pub fn new(
        plan: &CompressionPlan,
        parameters: &[NamedParameter],
        workers: usize,
    ) -> Result<Self, PipelineError> {
        let model = Sizes::of(parameters);
        let vectors = match plan.ratio {
            Some(ratio) if ratio > SELDOM_ABOVE && can_be_seldom(plan.method) => SELDOM,
            _ => Vectors::Whole,
        };
        let settings = CompressionSettings {
            residual_decay: plan.residual_decay as f32,
            warmup_steps: plan.warmup_steps,
            error_feedback: plan.error_feedback,
            vectors,
            workers,
        };
        let family = Family::of(plan.method, &model);
        let gradient_bytes = 4.0 * (model.elements() + model.vectors) as f64;
        let beside =
            model.vectors as f64 * vectors.bytes_per_element() + model.count_of_lengths as f64;
        let sent = |member: usize| -> Result<f64, SparseError> {
            let (_, bytes) = family.member(member)?;
            let matrices = model.matrices.iter().map(|dims| bytes(*dims));
            Ok(beside + matrices.sum::<f64>())
        };
        let chosen = match plan.ratio {
            None => Ok((0, [0.0, f64::INFINITY])),
            Some(ratio) => {
                let most = gradient_bytes / ratio;
                let chosen = family.largest_within(most, sent);
                chosen.and_then(|member| {
                    Ok((
                        member,
                        [
                            sent(member)? / TOLERANCE,
                            TOLERANCE * sent(family.members - 1)?,
                        ],
                    ))
                })
            }
        };
        let (member, within) = chosen.map_err(unlikely)?;
        if let Some(ratio) = plan.ratio
            && !(within[0]..=within[1]).contains(&(gradient_bytes / ratio))
        {
            let ends = [family.members - 1, 0].map(sent);
            let ends = ends.map(|bytes| bytes.map_or(f64::NAN, |bytes| gradient_bytes / bytes));
            return Err(RatioError {
                method: plan.method.name(),
                ratio,
                reached: ends,
            }
            .into());
        }
        let (code, _) = family.member(member).map_err(unlikely)?;
        Ok(Self {
            compression: Compression {
                plan: Some(*plan),
                ..Compression::of(code, settings)?
            },
            reach: Reach {
                sent_bytes: sent(member).map_err(unlikely)?,
                gradient_bytes,
            },
        })
    }
}

impl Method {
    /// For a person: what a step sends.
    pub fn describe(&self, plan: &CompressionPlan, workers: usize) -> String {
        let name = plan.method.name();
        let Reach {
            sent_bytes,
            gradient_bytes,
        } = self.reach;
        let [sent, whole] = [sent_bytes, gradient_bytes].map(|size| bytes(size as u64));
        let ratio = self.reach.ratio();
        let mut text = format!(
            "gradients by {name}: a worker sends about {sent} of {whole} in a step, {ratio:.0} times less"
        );
        if workers == 1 {
            text.push_str("; with one worker compression only costs");
        }
        text
    }
}

/// Densities come from a list of valid ones.
fn unlikely(error: SparseError) -> PipelineError {
    failure(error.to_string())
}

/// Numbers that are added on their way are f32 in every round.
fn can_be_seldom(method: CompressionMethod) -> bool {
    !matches!(
        method,
        CompressionMethod::PowerSgd | CompressionMethod::RandomK | CompressionMethod::VsaSketch
    )
}

/// The sizes of a model's trained parameters.
struct Sizes {
    /// [rows, cols] of every matrix.
    matrices: Vec<[usize; 2]>,
    /// Elements of all vectors.
    vectors: usize,
    /// About the bytes of the lengths in a message: two for a matrix, one for a vector.
    count_of_lengths: usize,
}

impl Sizes {
    fn of(parameters: &[NamedParameter]) -> Self {
        let (matrices, vectors): (Vec<_>, Vec<_>) = parameters
            .iter()
            .partition(|parameter| is_matrix(parameter));
        Self {
            matrices: matrices
                .iter()
                .map(|matrix| {
                    let cols = matrix.dims.last().copied().unwrap_or(1);
                    [matrix.dims.iter().product::<usize>() / cols.max(1), cols]
                })
                .collect(),
            vectors: vectors
                .iter()
                .map(|vector| vector.dims.iter().product::<usize>())
                .sum(),
            count_of_lengths: 2 * matrices.len() + vectors.len(),
        }
    }

    /// Elements of all matrices.
    fn elements(&self) -> usize {
        self.matrices.iter().map(|[rows, cols]| rows * cols).sum()
    }
}

/// The members of a method, from the one that sends least to the one that sends most: densities
/// 2 % apart, or ranks.
struct Family {
    method: CompressionMethod,
    members: usize,
    /// Density of the last member.
    densest: f64,
}

const GROWTH: f64 = 1.02;

/// The bytes that a matrix [rows, cols] takes.
type Bytes = Box<dyn Fn([usize; 2]) -> f64>;

impl Family {
    fn of(method: CompressionMethod, model: &Sizes) -> Self {
        let of_densities = |least: f64, densest: f64| Self {
            method,
            members: ((densest / least).ln() / GROWTH.ln()) as usize + 1,
            densest,
        };
        let of_ranks = |members: usize| Self {
            method,
            members: members.max(1),
            densest: 1.0,
        };
        match method {
            CompressionMethod::Ternary | CompressionMethod::VsaRotate => {
                of_densities(1e-4, DENSEST_TRITS)
            }
            CompressionMethod::TopK
            | CompressionMethod::Demo
            | CompressionMethod::RandomK
            | CompressionMethod::VsaSketch => of_densities(1e-5, 1.0),
            CompressionMethod::PowerSgd => {
                let sides = model.matrices.iter().map(|[rows, cols]| *rows.min(cols));
                of_ranks(sides.max().unwrap_or(1))
            }
            CompressionMethod::Sign | CompressionMethod::None => of_ranks(1),
        }
    }

    /// A member's code, and the bytes that it takes.
    fn member(&self, number: usize) -> Result<(Code, Bytes), SparseError> {
        let density = self.densest / GROWTH.powi((self.members - 1 - number) as i32);
        Ok(match self.method {
            CompressionMethod::TopK => sparse(Sparse::top_k(density)?),
            CompressionMethod::Ternary => sparse(Sparse::ternary(density)?),
            CompressionMethod::VsaRotate => sparse(Sparse::rotated(density)?),
            CompressionMethod::Demo => {
                let code = Demo::new(density)?;
                let bytes = move |dims| code.expected_bits(dims) / 8.0;
                (Code::Gathered(Box::new(code)), Box::new(bytes))
            }
            CompressionMethod::Sign => {
                let bytes = |[rows, cols]: [usize; 2]| Sign::bytes(rows * cols) as f64;
                (Code::Gathered(Box::new(Sign)), Box::new(bytes))
            }
            CompressionMethod::RandomK => {
                let code = RandomK::new(density)?;
                let bytes = move |[rows, cols]: [usize; 2]| 4.0 * code.count(rows * cols) as f64;
                (Code::Added(Box::new(code)), Box::new(bytes))
            }
            CompressionMethod::VsaSketch => {
                let code = Sketch::new(density)?;
                let bytes = move |[rows, cols]: [usize; 2]| 4.0 * code.count(rows * cols) as f64;
                (Code::Added(Box::new(code)), Box::new(bytes))
            }
            CompressionMethod::PowerSgd => {
                let code = PowerSgd::new(number + 1);
                let bytes =
                    move |dims: [usize; 2]| 4.0 * (code.rank(dims) * (dims[0] + dims[1])) as f64;
                (Code::Added(Box::new(code)), Box::new(bytes))
            }
            CompressionMethod::None => unreachable!("a plan has no compression that does nothing"),
        })
    }

    /// The last member that sends at most so many bytes; the first if there is none.
    fn largest_within(
        &self,
        most: f64,
        sent: impl Fn(usize) -> Result<f64, SparseError>,
    ) -> Result<usize, SparseError> {
        let (mut low, mut high) = (0, self.members);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match sent(middle)? <= most {
                true => low = middle,
                false => high = middle,
            }
        }
        Ok(low)
    }
}

fn sparse(code: Sparse) -> (Code, Bytes) {
    let bytes = move |[rows, cols]: [usize; 2]| code.expected_bits(rows * cols) / 8.0;
    (Code::Gathered(Box::new(code)), Box::new(bytes))
}
