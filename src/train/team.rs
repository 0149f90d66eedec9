//! The ranks of a run: what they agree on before its first step, and what rank 0 tells the others.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use burn::module::Param;
use burn::tensor::Tensor;

use super::{Session, TrainError, TrainState};
use crate::collective::{Collective, CollectiveError, SingleProcess};
use crate::model::{VisitParameters, visit_parameters};

/// The ranks of a run. Rank 0 is the lead: it alone owns the run folder, reports and saves.
#[derive(Clone)]
pub(super) struct Team {
    collective: Arc<dyn Collective>,
    places: Arc<Vec<Place>>,
}

/// Where a rank runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    /// Tells hosts and containers apart.
    host: String,
    /// The cores that the rank may use.
    cores: String,
}

impl Place {
    fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = read("/proc/self/status");
        let cores = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Self {
            host: read("/proc/sys/kernel/random/boot_id") + &read("/proc/sys/kernel/hostname"),
            cores: cores.unwrap_or_default().trim().to_string(),
        }
    }
}

impl Team {
    /// The only rank of a run.
    pub(super) fn alone() -> Self {
        Self {
            collective: Arc::new(SingleProcess),
            places: Arc::new(vec![Place::here()]),
        }
    }

    /// Meets the other ranks, which have to be of the same version.
    pub(super) fn meet(collective: Arc<dyn Collective>) -> Result<Self, TrainError> {
        let mut team = Self {
            collective,
            places: Arc::default(),
        };
        let version = env!("CARGO_PKG_VERSION").to_string();
        team.agree(
            "version",
            &BTreeMap::from([("firebrick".to_string(), version)]),
        )?;
        let places = team.gather(&Place::here())?;
        team.places = Arc::new(places);
        Ok(team)
    }

    pub(super) fn collective(&self) -> &dyn Collective {
        self.collective.as_ref()
    }

    pub(super) fn rank(&self) -> usize {
        self.collective.rank()
    }

    pub(super) fn ranks(&self) -> usize {
        self.collective.ranks()
    }

    /// Whether this rank owns the run folder, reports and saves.
    pub(super) fn is_lead(&self) -> bool {
        self.rank() == 0
    }

    /// Whether this is the first rank of its host.
    pub(super) fn is_first_of_host(&self) -> bool {
        let here = &self.places[self.rank()].host;
        self.places.iter().position(|place| place.host == *here) == Some(self.rank())
    }

    /// The number of ranks on this host, which share its memory.
    pub(super) fn on_host(&self) -> usize {
        let here = &self.places[self.rank()];
        self.places
            .iter()
            .filter(|place| place.host == here.host)
            .count()
    }

    /// The number of ranks that share their cores with this one, itself included.
    pub(super) fn on_cores(&self) -> usize {
        let here = &self.places[self.rank()];
        self.places.iter().filter(|place| *place == here).count()
    }

    /// Checks that all ranks have the same values. `what` names them together in the error, which
    /// every rank returns.
    pub(super) fn agree(
        &self,
        what: &'static str,
        values: &BTreeMap<String, String>,
    ) -> Result<(), TrainError> {
        if self.ranks() == 1 {
            return Ok(());
        }
        let all: Vec<BTreeMap<String, String>> = self.gather(values)?;
        let absent = "nothing".to_string();
        for (rank, other) in all.iter().enumerate().skip(1) {
            let mut keys: Vec<&String> = all[0].keys().chain(other.keys()).collect();
            keys.sort_unstable();
            keys.dedup();
            let lines = keys.into_iter().filter_map(|key| {
                let of =
                    |values: &BTreeMap<String, String>| values.get(key).unwrap_or(&absent).clone();
                let (first, second) = (of(&all[0]), of(other));
                (first != second)
                    .then(|| format!("  {key}: {first} on rank 0, {second} on rank {rank}"))
            });
            let lines: Vec<String> = lines.collect();
            if !lines.is_empty() {
                return Err(TrainError::RanksDiffer {
                    what,
                    rank,
                    difference: lines.join("\n"),
                });
            }
        }
        Ok(())
    }

    /// Each rank's value, in the order of the ranks.
    pub(super) fn gather<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
    ) -> Result<Vec<T>, TrainError> {
        let all = self.collective.gather(self.to_bytes(value)?)?;
        all.iter().map(|bytes| self.of_bytes(bytes)).collect()
    }

    /// Rank 0's value, on every rank. `value` is asked on rank 0 only.
    pub(super) fn tell<T: Serialize + DeserializeOwned>(
        &self,
        value: impl FnOnce() -> T,
    ) -> Result<T, TrainError> {
        if self.ranks() == 1 {
            return Ok(value());
        }
        let own = match self.is_lead() {
            true => self.to_bytes(&value())?,
            false => Vec::new(),
        };
        let all = self.collective.gather(own)?;
        self.of_bytes(&all[0])
    }

    /// Waits until every rank has come here.
    pub(super) fn wait_for_all(&self) -> Result<(), CollectiveError> {
        self.collective.sum(&mut [])
    }

    fn to_bytes(&self, value: &impl Serialize) -> Result<Vec<u8>, TrainError> {
        serde_json::to_vec(value).map_err(|error| self.other_form(&error))
    }

    fn of_bytes<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, TrainError> {
        serde_json::from_slice(bytes).map_err(|error| self.other_form(&error))
    }

    fn other_form(&self, error: &serde_json::Error) -> TrainError {
        let rank = self.rank();
        let reason = format!("a message of another form: {error}");
        TrainError::Collective(CollectiveError { rank, reason })
    }
}

impl Session {
    /// Checks that all ranks have the same weights, bit for bit. They would not if two of them rounded
    /// differently.
    pub(super) fn check_ranks(&self, state: &TrainState) -> Result<(), TrainError> {
        if self.team.ranks() == 1 {
            return Ok(());
        }
        let mut weights = TrainedWeights(blake3::Hasher::new());
        visit_parameters(state.model(), &mut weights);
        let hash = weights.0.finalize().as_bytes().to_vec();
        let all = self.team.collective().gather(hash)?;
        let step = state.progress.step;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(TrainError::RanksDrifted { rank, step }),
            None => Ok(()),
        }
    }
}

/// A hash of the trained weights.
struct TrainedWeights(blake3::Hasher);

impl VisitParameters for TrainedWeights {
    fn visit<const D: usize>(&mut self, _path: &str, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.0.update(param.val().into_data().as_bytes());
        }
    }
}
