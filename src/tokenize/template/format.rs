//! Which form of message content a template wants, found as vLLM finds it: by its loops.
//!
//! A template that loops over the `content` of a message that it got by looping over `messages` takes
//! lists of parts; any other takes strings. Variables that `set` or a loop gave another name are
//! followed, through filters, tests and slices, without regard to scope. So is content that is given to a
//! macro which loops over it, and a loop over `content` itself counts outside of macros.

use std::collections::VecDeque;

use minijinja::{
    machinery::{
        ast::{CallArg, Expr, Macro, Stmt},
        parse,
    },
    syntax::SyntaxConfig,
};

/// The form of `message.content` that a template takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// One string; parts are joined by newlines.
    String,
    /// A list of parts, as in the API of OpenAI.
    Parts,
}

/// The form that a template takes; strings if it cannot be told.
pub(super) fn detect(source: &str, syntax: SyntaxConfig) -> ContentFormat {
    let Ok(tree) = parse(source, "", syntax) else { return ContentFormat::String };
    let (mut loops, mut assignments) = (Vec::new(), Vec::new());
    collect(&tree, &mut loops, &mut assignments);
    let messages = names_of("messages", &assignments);
    let Some(items) = targets(&loops, &messages, None) else { return ContentFormat::String };
    let Some(contents) = targets(&loops, &items, Some("content")) else {
        return ContentFormat::String;
    };
    let (mut macros, mut calls) = (Vec::new(), Vec::new());
    let by_name = macros_and_calls(&tree, &mut macros, &mut calls);
    let in_macro = || macros.iter().any(|defined| loops_over_content(defined, &calls, &items));
    if contents.is_empty() && !by_name && !in_macro() {
        return ContentFormat::String;
    }
    ContentFormat::Parts
}

/// A macro's name, and what it is given.
type MacroCall<'t, 's> = (&'s str, &'t [CallArg<'s>]);

/// Collects macros and calls; whether a loop outside of macros is over `content`.
fn macros_and_calls<'t, 's>(
    statement: &'t Stmt<'s>,
    macros: &mut Vec<&'t Macro<'s>>,
    calls: &mut Vec<MacroCall<'t, 's>>,
) -> bool {
    let mut found = false;
    match statement {
        Stmt::EmitExpr(emit) => calls_in(&emit.expr, calls),
        Stmt::Set(set) => calls_in(&set.expr, calls),
        Stmt::IfCond(branch) => calls_in(&branch.expr, calls),
        Stmt::ForLoop(each) => {
            found = is_name(&each.iter, "content");
            calls_in(&each.iter, calls);
        }
        Stmt::Macro(defined) => macros.push(defined),
        _ => {}
    }
    for inner in bodies(statement).into_iter().flatten() {
        found |= macros_and_calls(inner, macros, calls);
    }
    found && !matches!(statement, Stmt::Macro(_))
}

fn calls_in<'t, 's>(expression: &'t Expr<'s>, calls: &mut Vec<MacroCall<'t, 's>>) {
    match expression {
        Expr::Call(call) => {
            if let Expr::Var(name) = &call.expr {
                calls.push((name.id, &call.args));
            }
            calls_in(&call.expr, calls);
        }
        Expr::BinOp(both) => {
            calls_in(&both.left, calls);
            calls_in(&both.right, calls);
        }
        Expr::IfExpr(either) => {
            calls_in(&either.true_expr, calls);
            if let Some(other) = &either.false_expr {
                calls_in(other, calls);
            }
        }
        Expr::Filter(filter) => {
            if let Some(inner) = &filter.expr {
                calls_in(inner, calls);
            }
        }
        Expr::GetAttr(access) => calls_in(&access.expr, calls),
        Expr::GetItem(access) => calls_in(&access.expr, calls),
        _ => {}
    }
}

/// Whether a macro loops over a parameter that some call fills with the content of a message.
fn loops_over_content(defined: &Macro<'_>, calls: &[MacroCall<'_, '_>], items: &[&str]) -> bool {
    let (mut loops, mut assignments) = (Vec::new(), Vec::new());
    for inner in &defined.body {
        collect(inner, &mut loops, &mut assignments);
    }
    let is_content =
        |value: &Expr<'_>| items.iter().any(|name| accesses(value, name, Some("content")));
    let fills = |parameter: usize, name: &str| {
        calls.iter().filter(|(called, _)| *called == defined.name).any(|(_, args)| {
            args.iter().enumerate().any(|(at, arg)| match arg {
                CallArg::Pos(value) => at == parameter && is_content(value),
                CallArg::Kwarg(key, value) => *key == name && is_content(value),
                _ => false,
            })
        })
    };
    defined.args.iter().enumerate().any(|(at, parameter)| match parameter {
        Expr::Var(name) => {
            loops.iter().any(|(_, iter)| is_name(iter, name.id)) && fills(at, name.id)
        }
        _ => false,
    })
}

type Pair<'t, 's> = (&'t Expr<'s>, &'t Expr<'s>);

/// Loops as (target, what is looped over), assignments as (target, value), in the whole tree.
fn collect<'t, 's>(
    statement: &'t Stmt<'s>,
    loops: &mut Vec<Pair<'t, 's>>,
    assignments: &mut Vec<Pair<'t, 's>>,
) {
    match statement {
        Stmt::ForLoop(each) => loops.push((&each.target, &each.iter)),
        Stmt::Set(set) => assignments.push((&set.target, &set.expr)),
        _ => {}
    }
    for inner in bodies(statement).into_iter().flatten() {
        collect(inner, loops, assignments);
    }
}

/// The statements within a statement.
fn bodies<'t, 's>(statement: &'t Stmt<'s>) -> [&'t [Stmt<'s>]; 2] {
    match statement {
        Stmt::Template(template) => [&template.children, &[]],
        Stmt::ForLoop(each) => [&each.body, &each.else_body],
        Stmt::IfCond(branch) => [&branch.true_body, &branch.false_body],
        Stmt::WithBlock(block) => [&block.body, &[]],
        Stmt::SetBlock(block) => [&block.body, &[]],
        Stmt::AutoEscape(block) => [&block.body, &[]],
        Stmt::FilterBlock(block) => [&block.body, &[]],
        Stmt::Block(block) => [&block.body, &[]],
        Stmt::Macro(defined) => [&defined.body, &[]],
        Stmt::CallBlock(call) => [&call.macro_decl.body, &[]],
        _ => [&[], &[]],
    }
}

/// A name and every name that it was assigned to, directly or over others.
fn names_of<'s>(name: &'s str, assignments: &[Pair<'_, 's>]) -> Vec<&'s str> {
    let mut names = vec![name];
    let mut open = VecDeque::from([name]);
    while let Some(name) = open.pop_front() {
        for (target, value) in assignments {
            let Expr::Var(target) = target else { continue };
            if accesses(value, name, None) && !names.contains(&target.id) {
                names.push(target.id);
                open.push_back(target.id);
            }
        }
    }
    names
}

/// The loop variables of loops over one of the names, or over their `key`. `None` if such a loop
/// unpacks its items, which nobody does to messages.
fn targets<'s>(loops: &[Pair<'_, 's>], names: &[&str], key: Option<&str>) -> Option<Vec<&'s str>> {
    let over = |iter: &Expr<'_>| names.iter().any(|name| accesses(iter, name, key));
    let found = loops.iter().filter(|(_, iter)| over(iter));
    found
        .map(|(target, _)| match target {
            Expr::Var(target) => Some(target.id),
            _ => None,
        })
        .collect()
}

/// Whether an expression is the variable, or its `key`, perhaps filtered, tested or sliced.
fn accesses(expression: &Expr<'_>, name: &str, key: Option<&str>) -> bool {
    match (expression, key) {
        (Expr::Filter(filter), _) => {
            filter.expr.as_ref().is_some_and(|inner| accesses(inner, name, key))
        }
        (Expr::Test(test), _) => accesses(&test.expr, name, key),
        (Expr::Slice(slice), _) => accesses(&slice.expr, name, key),
        (Expr::GetAttr(access), Some(key)) => access.name == key && is_name(&access.expr, name),
        (Expr::GetItem(access), Some(key)) => {
            let Expr::Const(subscript) = &access.subscript_expr else { return false };
            subscript.value.as_str() == Some(key) && is_name(&access.expr, name)
        }
        (expression, None) => is_name(expression, name),
        _ => false,
    }
}

fn is_name(expression: &Expr<'_>, name: &str) -> bool {
    matches!(expression, Expr::Var(variable) if variable.id == name)
}
